"""How functions are compiled: serial, without the GIL, with the arithmetic of NumPy.

No disk cache: it fails at import on read-only installs and was seen to serve wrong machine
code. No `fastmath=True`: it makes tests for NaN and infinity false.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Compiled = TypeVar("Compiled", bound=Callable[..., Any])

_KERNEL: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}
_INNER: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False, "no_cpython_wrapper": True}


def kernel(function: Compiled) -> Compiled:
    """Compile what Python calls."""
    compiled: Compiled = njit(**_KERNEL)(function)
    return compiled


def inner(function: Compiled) -> Compiled:
    """Compile what only compiled functions call: without the wrappers for Python, a quarter faster."""
    compiled: Compiled = njit(**_INNER)(function)
    return compiled


def merged(function: Compiled) -> Compiled:
    """Compile as part of its one caller: an `inner` function is optimised alone, and again wherever it goes."""
    compiled: Compiled = njit(inline="always", **_INNER)(function)
    return compiled


def inner_any_order(function: Compiled) -> Compiled:
    """Compile a sum whose order is free, because it is rounded exactly later. NaN and infinity stay true."""
    compiled: Compiled = njit(fastmath={"reassoc", "contract", "arcp"}, **_INNER)(function)
    return compiled


def standalone(function: Compiled) -> Compiled:
    """Compile alone what several kernels call, and call it at its address: once for all, not once inside of each.

    LLVM sees nothing of the caller there, so this is for calls that serve thousands of elements.
    """
    dispatcher: Any = inner(function)

    def typed(typing_context: Any, *args: Any) -> tuple[Any, Callable[..., Any]]:
        plain = tuple(types.unliteral(arg) for arg in args)
        dispatcher.compile(plain)
        compiled = dispatcher.overloads[plain]
        result = compiled.signature.return_type

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
            pointer = context.call_conv.get_function_type(result, plain).as_pointer()
            callee = builder.inttoptr(ir.Constant(ir.IntType(context.address_size), address), pointer)
            status, returned = context.call_conv.call_function(builder, callee, result, plain, values)
            with cgutils.if_unlikely(builder, status.is_error):  # bounds are checked where Numba is told to
                context.call_conv.return_status_propagate(builder, status)
            return returned

        return result(*plain), generate

    count = len(inspect.signature(function).parameters)
    called: Compiled = with_arguments(typed, function.__name__, function.__doc__, count)
    return called


def with_arguments(typed: Any, name: str, doc: str | None, count: int) -> Any:
    """The intrinsic that ``typed(context, *types)`` describes, for `count` positional arguments."""
    kinds = [inspect.Parameter(f"argument{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(count + 1)]
    typed.__name__, typed.__doc__, typed.__signature__ = name, doc, inspect.Signature(kinds)
    return intrinsic(typed)
