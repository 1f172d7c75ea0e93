"""How many blocks survive: exact counts from sparsities, and the checks on `nnz` and `k`."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from npscope.axes import array_namespace
from npscope.errors import KindError, SpecError
from npscope.operands import is_cupy
from npscope.options import checks_devices
from npscope.tiling import as_int

_WRITTEN = re.compile(
    r"[-+]?(\d{1,400}/0*[1-9]\d{0,399}|(\d{1,400}\.?\d{0,400}|\.\d{1,400})(e[-+]?\d{1,3})?)", re.IGNORECASE | re.ASCII
)
"""Numbers that an exact fraction holds in reasonable memory: 1e-999999999 is none."""


Share = float | str | Decimal | Fraction
"""A share as a user may give it: a float means its shortest decimal."""


def nnz_from_sparsity(s: Share, n: int) -> int:
    """Blocks to keep out of `n` so that ``floor(s * n)`` are pruned, in exact arithmetic.

    Parameters
    ----------
    s
        Share of blocks to prune, in [0, 1]. A float means its shortest decimal form *in its own
        dtype*, so 0.29 of 100 prunes 29 although ``0.29 * 100 < 29`` in binary; str, Decimal and
        Fraction are taken as they are.
    n
        Number of blocks, at least 0.

    Raises
    ------
    SpecError
        (a ValueError) `s` is no number, NaN or outside [0, 1], or `n` is negative.
    KindError
        (a TypeError) `s` is a bool or no number, or `n` no integer.

    Examples
    --------
    >>> nnz_from_sparsity(0.29, 100), nnz_from_sparsity("1/3", 10)
    (71, 7)
    """
    count = as_int(n, "n")
    if count < 0:
        raise SpecError(f"n = {count} blocks must not be negative")
    return count - math.floor(_fraction(s) * count)


def _fraction(s: Any) -> Fraction:
    if isinstance(s, bool | np.bool_) or not (
        isinstance(s, int | float | str | Decimal | Fraction) or (isinstance(s, np.generic) and s.dtype.kind in "fiuV")
    ):
        raise KindError(f"sparsity must be a real number, str, Decimal or Fraction, not {type(s).__name__} {s!r}")
    text = _shortest(s) if isinstance(s, np.generic) else str(s)
    if not _WRITTEN.fullmatch(text):
        raise SpecError(f"sparsity {text:.80} is not a number in [0, 1] of at most 400 digits")
    share = Fraction(text)
    if not 0 <= share <= 1:
        raise SpecError(f"sparsity {text} is outside [0, 1]; it is the share of blocks to prune")
    return share


def _shortest(s: np.generic) -> str:
    """The shortest decimal that reads back as the same number of the same dtype."""
    value = float(s)
    texts = (f"{value:.{digits}g}" for digits in range(1, 18))
    return next((text for text in texts if type(s)(float(text)) == s), str(value))


def as_counts(value: Any, shape: tuple[int, ...], *, low: int, high: int, what: str) -> Any:
    """`value` as an int64 array broadcast to `shape`, each entry in [low, high].

    An integer or an integer array; KindError for floats and bools, SpecError outside the range or
    when the shapes do not broadcast. Never copies to the full shape. Counts in device memory stay
    there: their backend clamps them, and only ``config(check=True)`` reads them.
    """
    if type(value) is int:  # what most are; to look for arrays first takes longer than all else
        return _everywhere(_within(value, low, high, what), shape)
    if is_cupy(value):
        return _on_device(value, shape, low, high, what)
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__") and getattr(value, "ndim", 0) > 0:
        value = _on_host(value, what)
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        if value.dtype.kind not in "iu":
            raise KindError(f"{what} must be an integer or an integer array, not an array of {value.dtype}")
        counts = value
    else:
        return _everywhere(_as_count(value, low, high, what), shape)
    least, most = (int(counts.min()), int(counts.max())) if counts.size else (low, high)
    if least < low or most > high:
        raise SpecError(f"{what} = {least if least < low else most} is outside [{low}, {high}]")
    try:
        np.broadcast_to(counts, shape)
    except ValueError:
        raise SpecError(f"{what} of shape {counts.shape} does not broadcast to the scope grid {shape}") from None
    if least == most and counts.size:
        return _everywhere(least, shape)
    return np.broadcast_to(np.array(counts, dtype=np.int64), shape)  # a copy: it may alias what is written


@lru_cache(maxsize=1024)
def _everywhere(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """One count for every scope: eight bytes that cannot be written, whatever the shape."""
    return np.broadcast_to(np.int64(count), shape)


def _on_device(value: Any, shape: tuple[int, ...], low: int, high: int, what: str) -> Any:
    """CuPy counts broadcast to `shape`, unread."""
    if value.dtype.kind not in "iu":
        raise KindError(f"{what} must be an integer or an integer array, not an array of {value.dtype}")
    if checks_devices() and value.size and not (low <= int(value.min()) and int(value.max()) <= high):
        worst = int(value.min()) if int(value.min()) < low else int(value.max())
        raise SpecError(f"{what} = {worst} is outside [{low}, {high}]")
    try:
        return array_namespace(value).broadcast_to(value.astype("int64"), shape)
    except ValueError:
        raise SpecError(f"{what} of shape {value.shape} does not broadcast to the scope grid {shape}") from None


def _on_host(value: Any, what: str) -> np.ndarray:
    """An array of another library as a NumPy array of the same memory."""
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError):
        raise KindError(
            f"{what} is a {type(value).__module__}.{type(value).__name__} that NumPy cannot read; pass a NumPy array"
        ) from None


def _as_count(value: Any, low: int, high: int, what: str) -> int:
    if isinstance(value, list | tuple | np.ma.MaskedArray):
        raise KindError(f"{what} must be an integer or an integer array, not {type(value).__name__}; use numpy.asarray")
    return _within(as_int(value, what), low, high, what)


def _within(count: int, low: int, high: int, what: str) -> int:
    if not low <= count <= high:
        raise SpecError(f"{what} = {count} is outside [{low}, {high}]")
    return count
