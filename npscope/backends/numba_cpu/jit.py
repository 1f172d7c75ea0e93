"""How functions are compiled: serial, without the GIL, with the arithmetic of NumPy.

No disk cache: it fails at import on read-only installs and was seen to serve wrong machine
code. No `fastmath=True`: it makes tests for NaN and infinity false.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

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
