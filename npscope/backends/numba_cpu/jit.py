"""How functions are compiled: serial, without the GIL, with the arithmetic of NumPy.

No disk cache: it fails at import on read-only installs and was seen to serve wrong machine
code. No `fastmath=True`: it makes tests for NaN and infinity false.
"""

from __future__ import annotations

import gc
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import from_dtype, njit, types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

Compiled = TypeVar("Compiled", bound=Callable[..., Any])

# Without a `fastmath` of its own, what is called has that of its first caller: that of a sum in any order.
_ALL: dict[str, Any] = {"error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True, "_nrt": False}
_KERNEL: dict[str, Any] = {**_ALL, "nogil": True}
_INNER: dict[str, Any] = {**_ALL, "no_cpython_wrapper": True}


class _Collection:
    """Garbage collection of the whole process: paused while one call or more say so, then as before the first.

    What a compiler builds stays alive until it is done, and is looked through in vain: a tenth of a first call. Who
    switches collection off meanwhile, in another thread, finds it on again.
    """

    def __init__(self) -> None:
        self._lock, self._pausing, self._was_on = threading.RLock(), set[object](), False

    def pause(self, call: object) -> None:
        with self._lock:
            self._pausing.add(call)
            if len(self._pausing) == 1:
                self._was_on = gc.isenabled()
                gc.disable()

    def resume(self, call: object) -> None:
        """Undo what `pause` did for this call, all of it, some, or nothing where an interrupt came before."""
        with self._lock:
            self._pausing.discard(call)
            if self._was_on and not self._pausing:
                gc.enable()
                self._was_on = False

    def resume_in_child(self) -> None:
        """After a fork: calls of other threads do not go on."""
        if self._was_on:
            gc.enable()
        self.__init__()  # type: ignore[misc]


_collection = _Collection()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_collection.resume_in_child)
    # A child has none of the parent's threads: the lock of one that compiles would be taken there for ever.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def _jitted(function: Callable[..., Any], **options: Any) -> Any:
    """The dispatcher of a function, which compiles while no garbage is collected."""
    dispatcher = njit(**options)(function)
    if dispatcher is function:
        raise ImportError("Numba does not compile: NUMBA_DISABLE_JIT is set")
    compile_for = dispatcher.compile

    def compile_undisturbed(*arguments: Any) -> Any:
        call = object()
        try:
            _collection.pause(call)
            return compile_for(*arguments)
        finally:
            _collection.resume(call)

    dispatcher.compile = compile_undisturbed
    return dispatcher


def kernel(function: Callable[..., Any]) -> Any:
    """Compile what Python calls. Not typed: operands are passed as tuples spread over several arguments."""
    return _jitted(function, **_KERNEL)


def inner(function: Compiled) -> Compiled:
    """Compile what only compiled functions call: without the wrappers for Python, a quarter faster."""
    compiled: Compiled = _jitted(function, **_INNER)
    return compiled


def merged(function: Compiled) -> Compiled:
    """Compile as part of each caller: an `inner` function is optimised alone, and again wherever it goes."""
    compiled: Compiled = _jitted(function, inline="always", **_INNER)
    return compiled


def inner_any_order(function: Compiled) -> Compiled:
    """Compile a sum whose order is free, because it is rounded exactly later. NaN and infinity stay true."""
    compiled: Compiled = _jitted(function, **{**_INNER, "fastmath": {"reassoc", "contract"}})
    return compiled


def standalone(function: Compiled) -> Compiled:
    """Compile alone what several kernels call, and call it at its address: once for all, not once inside of each.

    LLVM sees nothing of the caller there, so this is for calls that serve many elements, or are rare. No keywords, no
    defaults, no recursion.
    """
    dispatcher: Any = inner(function)

    def typed(typing_context: Any, *args: Any) -> tuple[Any, Callable[..., Any]]:
        plain = tuple(types.unliteral(arg) for arg in args)
        address, result = _compiled(dispatcher, plain)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            # In Numba's own way, so that it never keeps code on a disk that has an address in it.
            place = context.add_dynamic_addr(builder, address, info=function.__name__)
            return _call(context, builder, place, result(*plain), values)

        return result(*plain), generate

    count = len(inspect.signature(function).parameters)
    called: Any = intrinsic_of(typed, function.__name__, function.__doc__, count)
    called.dispatcher = dispatcher
    return called  # type: ignore[no-any-return]


def address_of(function: Any, *arguments: Any, result: Any = types.void) -> int:
    """Where the code of a `standalone` function is, for arguments of these Numba types: what a `caller` calls."""
    address, found = _compiled(function.dispatcher, arguments)
    if found != result:
        raise TypeError(f"{function} returns {found}, not {result}")
    return address


def array_of(dtype: Any, dimensions: int = 1) -> Any:
    """The Numba type of contiguous arrays."""
    return types.Array(from_dtype(np.dtype(dtype)), dimensions, "C")


def caller(count: int, result: Any = types.void, *, optional: bool = False) -> Any:
    """``call(address, *arguments)`` for compiled functions: a kernel that is told what to call serves all of its kind.

    The address is that of a function for the same types, with this result; nothing checks it. But its arrays may be
    given as bytes: to the machine an array is an address, whatever it is of. If it is `optional`, and without a result,
    at 0 nothing is called.
    """

    def typed(typing_context: Any, *args: Any) -> tuple[Any, Callable[..., Any]]:
        plain = tuple(types.unliteral(arg) for arg in args[1:])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            place = builder.inttoptr(values[0], cgutils.voidptr_t)
            if not optional:
                return _call(context, builder, place, result(*plain), values[1:])
            with builder.if_then(cgutils.is_not_null(builder, place)):
                _call(context, builder, place, result(*plain), values[1:])
            return context.get_dummy_value()

        return result(types.int64, *plain), generate

    return intrinsic_of(typed, "call", None, 1 + count)


def _compiled(dispatcher: Any, arguments: tuple[Any, ...]) -> tuple[int, Any]:
    """(address, type of the result) of a function for arguments of these types. The dispatcher keeps it alive."""
    dispatcher.compile(arguments)
    compiled = dispatcher.overloads[arguments]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    if not address:
        raise RuntimeError(f"Numba has no machine code of {compiled.fndesc.llvm_func_name!r:.200}")
    return address, compiled.signature.return_type


def _call(context: Any, builder: Any, place: Any, signature: Any, values: Any) -> Any:
    result, arguments = signature.return_type, signature.args
    callee = builder.bitcast(place, context.call_conv.get_function_type(result, arguments).as_pointer())
    status, returned = context.call_conv.call_function(builder, callee, result, arguments, values)
    with cgutils.if_unlikely(builder, status.is_error):  # bounds are checked where Numba is told to
        context.call_conv.return_status_propagate(builder, status)
    return returned


def _small(typing_context: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        for attribute in ("optsize", "minsize"):
            builder.function.attributes.add(attribute)
        return context.get_dummy_value()

    return types.void(), generate


def intrinsic_of(typed: Any, name: str, doc: str | None, count: int) -> Any:
    """The intrinsic that ``typed(context, *types)`` describes, for `count` positional arguments."""
    kinds = [inspect.Parameter(f"argument{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(count + 1)]
    typed.__name__, typed.__doc__, typed.__signature__ = name, doc, inspect.Signature(kinds)
    return intrinsic(typed)


make_small: Any = intrinsic_of(_small, "make_small", None, 0)
"""``make_small()``: have LLVM make the function that says so small, and not fast, in a third of the time.

For code that is rare, or whose vectors are ours.
"""
