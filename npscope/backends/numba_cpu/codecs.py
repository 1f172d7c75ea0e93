"""How kernels read and write one element of each dtype, wherever it lies.

A codec turns memory into numbers. Floats of 16 and 8 bits are decoded from their bits,
which Numba has no types for; foreign byte order and unaligned data are assembled byte by
byte. So a kernel is written once, for a codec, and no operand is ever copied to suit it.

Index unit: one scalar of the buffer (a complex number is two), or one byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from npscope.backends.numba_cpu.jit import inner, merged
from npscope.backends.numba_cpu.scalars import SAFE_LEAST, bits_of, float_of, or_zero
from npscope.dtypes import Kind

Function = Callable[..., Any]
Bits = Any
"""An unsigned NumPy scalar, whose width matters."""
Real = Any
"""A NumPy float scalar, whose width matters."""

_NAN32, _SIGN32, _INF32 = np.uint32(0xFFFFFFFF), np.uint32(0x80000000), np.uint32(0x7F800000)
_NAN64, _SIGN64, _INF64 = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(1 << 63), np.uint64(0x7FF0000000000000)

_STORAGE = {"float16": "u2", "bfloat16": "u2", "float8_e4m3fn": "u1", "float8_e5m2": "u1"}
_COMPLEX = {"complex64": "f4", "complex128": "f8"}


@dataclass(frozen=True, eq=False)
class Codec:
    """The element functions of one dtype in one kind of storage, all compiled.

    `unit` is the buffer's dtype.
    ``magnitude(buffer, i)`` is |x| as float64 (NaN if any part is), ``key32`` and ``key64`` are
    magnitudes as ordered integers (equal values, equal keys; NaN the largest), ``signed_key``
    orders signed values, ``keep(buffer, i, kept)`` writes +0.0
    unless `kept`, without a branch, ``drop`` whatever `kept` is, ``scale`` multiplies by a float64 (0 writes +0.0,
    1 keeps the bits), ``value`` reads a real number as float64, ``soften(buffer, i, t, h)`` is the
    proximal step of t * |x| in the metric h: towards zero by t / h, +0.0 where h * |x| is <= t as
    rounded to the norm's dtype; NaN stays, and everything for t = 0. ``narrow_key`` is the magnitude of an integer, or
    of a float of 16 or 8 bits, as an ordered integer of its own `width`, as signed keys are: more of them fit a vector.
    """

    unit: np.dtype
    magnitude: Function
    value: Function
    key32: Function
    key64: Function
    signed_key: Function
    keep: Function
    drop: Function
    scale: Function
    soften: Function
    narrow_key: Function | None
    width: int

    def key_of_width(self, bits: int) -> Function:
        """The key that is an integer of so many bits."""
        if self.narrow_key is not None and bits == self.width:
            return self.narrow_key
        return self.key64 if bits == 64 else self.key32


# --- ordered integers ----------------------------------------------------------------------------


@merged
def key_of_float32(size: Real) -> Bits:
    """The bits of a non-negative float32, which order as integers; every NaN is the largest key."""
    bits = bits_of(np.float32(size)) & np.uint32(0x7FFFFFFF)
    return _NAN32 if bits > _INF32 else bits


@merged
def key_of_float64(size: Real) -> Bits:
    """The bits of a non-negative float64, which order as integers; every NaN is the largest key."""
    bits = bits_of(np.float64(size)) & np.uint64(0x7FFFFFFFFFFFFFFF)
    return _NAN64 if bits > _INF64 else bits


@inner
def signed_key_of_float32(x: Real) -> Bits:
    """An integer that orders like the signed float32; -0.0 like +0.0, NaN the largest."""
    bits = bits_of(np.float32(x))
    size = bits & np.uint32(0x7FFFFFFF)
    if size > _INF32:
        return _NAN32
    if size == np.uint32(0):
        return _SIGN32
    return np.uint32(~bits) if bits != size else np.uint32(bits | _SIGN32)


@inner
def signed_key_of_float64(x: Real) -> Bits:
    """An integer that orders like the signed float64; -0.0 like +0.0, NaN the largest."""
    bits = bits_of(np.float64(x))
    size = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
    if size > _INF64:
        return _NAN64
    if size == np.uint64(0):
        return _SIGN64
    return np.uint64(~bits) if bits != size else np.uint64(bits | _SIGN64)


# --- decoding ------------------------------------------------------------------------------------


@inner
def _half_to_float32(bits: Bits) -> Real:
    # The exponent field is moved, then re-biased by an exact multiplication, which also normalises subnormals.
    size = np.uint32(bits) & np.uint32(0x7FFF)
    sign = (np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16)
    if size >= np.uint32(0x7C00):
        return float_of(np.uint32((size << np.uint32(13)) | np.uint32(0x7F800000) | sign))
    scaled = np.float32(float_of(np.uint32(size << np.uint32(13))) * np.float32(2.0**112))
    return float_of(np.uint32(bits_of(scaled) | sign))


@inner
def _float32_to_half(x: Real) -> Bits:
    bits = bits_of(np.float32(x))
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    if size > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00))
    if size >= np.uint32(0x477FF000):  # 65520 and above round to infinity
        return np.uint16(sign | np.uint32(0x7C00))
    if size < np.uint32(0x38800000):  # subnormal: adding 0.5 rounds at the right bit
        shifted = np.float32(float_of(np.uint32(size)) + np.float32(0.5))
        return np.uint16(sign | (bits_of(shifted) - np.uint32(0x3F000000)))
    odd = (size >> np.uint32(13)) & np.uint32(1)
    rounded = size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd
    return np.uint16(sign | (rounded >> np.uint32(13)))


@inner
def _bfloat_to_float32(bits: Bits) -> Real:
    return float_of(np.uint32(np.uint32(bits) << np.uint32(16)))


@inner
def _float32_to_bfloat(x: Real) -> Bits:
    bits = bits_of(np.float32(x))
    if (bits & np.uint32(0x7FFFFFFF)) > _INF32:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@inner
def _e5m2_to_float32(bits: Bits) -> Real:
    return _half_to_float32(np.uint32(bits) << np.uint32(8))


@inner
def _e4m3fn_to_float32(bits: Bits) -> Real:
    size = np.uint32(bits) & np.uint32(0x7F)
    sign = (np.uint32(bits) & np.uint32(0x80)) << np.uint32(24)
    if size == np.uint32(0x7F):
        return float_of(np.uint32(np.uint32(0x7FC00000) | sign))
    scaled = np.float32(float_of(np.uint32(size << np.uint32(20))) * np.float32(2.0**120))
    return float_of(np.uint32(bits_of(scaled) | sign))


@merged
def _same(x: Any) -> Any:
    return x


_DECODE = {
    "float16": _half_to_float32,
    "bfloat16": _bfloat_to_float32,
    "float8_e5m2": _e5m2_to_float32,
    "float8_e4m3fn": _e4m3fn_to_float32,
}
_ENCODE = {"float16": _float32_to_half, "bfloat16": _float32_to_bfloat}


@inner
def _difference(a: Real, b: Real) -> Real:
    return a - b


@inner
def _odd_difference(a: Real, b: Real) -> Real:
    """A float32 beside ``a - b``, for a > b >= 0, its last bit set where that is inexact.

    Rounded once more, to fewer bits, it gives what the exact difference would. What is lost is exact (Dekker 1971).
    """
    near = np.float32(a - b)
    lost = (a - near) - b
    below = bits_of(near) - np.uint32(lost < 0)
    return float_of(np.uint32(below | np.uint32((lost < 0) | (lost > 0))))


# --- storage -------------------------------------------------------------------------------------


# In aligned buffers of native byte order. Signed indices may count from the end, and that test keeps LLVM from making
# vectors of a loop.


@merged
def _fetch(buffer: Any, i: int) -> Any:
    return buffer[np.uintp(i)]


@merged
def _place(buffer: Any, i: int, x: Any) -> None:
    buffer[np.uintp(i)] = x


@cache
def _bytewise(scalar: str, swapped: bool) -> tuple[Function, Function]:
    """(fetch, place) of a scalar in a buffer of bytes: any alignment, either byte order."""
    dtype = np.dtype(scalar)
    width = dtype.itemsize
    unsigned = np.dtype(f"u{width}").type
    number = dtype.type
    little = (np.little_endian and not swapped) or (not np.little_endian and swapped)

    @merged
    def fetch(buffer: Any, i: int) -> Any:
        bits = np.uint64(0)
        for b in range(width):
            shift = np.uint64(8 * (b if little else width - 1 - b))
            bits |= np.uint64(buffer[i + b]) << shift
        return unsigned(bits).view(number)

    @merged
    def place(buffer: Any, i: int, x: Any) -> None:
        bits = np.uint64(number(x).view(unsigned))
        for b in range(width):
            shift = np.uint64(8 * (b if little else width - 1 - b))
            buffer[i + b] = np.uint8((bits >> shift) & np.uint64(255))

    return fetch, place


# --- codecs --------------------------------------------------------------------------------------


@cache
def codec(kind: Kind, bytewise: bool, swapped: bool) -> Codec:
    """The codec of a dtype, for aligned native memory or for single bytes (`swapped`: foreign order)."""
    scalar = _STORAGE.get(kind.name) or _COMPLEX.get(kind.name) or np.dtype(kind.name).str[1:]
    fetch, place = _bytewise(scalar, swapped) if bytewise else (_fetch, _place)
    unit = np.dtype("u1") if bytewise else np.dtype(scalar)
    step = np.dtype(scalar).itemsize if bytewise else 1
    if kind.is_complex:
        return _complex_codec(unit, step, fetch, place, kind)
    if kind.is_integer:
        return _integer_codec(unit, fetch, place, kind)
    return _float_codec(unit, fetch, place, kind)


def _droppers(fetch: Function, place: Function, zero: Any) -> tuple[Function, Function]:
    """`Codec.keep` and `Codec.drop` of one scalar."""

    @inner
    def keep(buffer: Any, i: int, kept: bool) -> None:
        place(buffer, i, or_zero(fetch(buffer, i), kept))

    @inner
    def drop(buffer: Any, i: int, kept: bool) -> None:
        place(buffer, i, zero)

    return keep, drop


def _float_codec(unit: np.dtype, fetch: Function, place: Function, kind: Kind) -> Codec:
    decode = _DECODE.get(kind.name, _same)
    narrow = kind.norm == "float32"
    zero = np.dtype(_STORAGE.get(kind.name, kind.name)).type(0)
    keep, drop = _droppers(fetch, place, zero)

    @inner
    def value(buffer: Any, i: int) -> Real:
        return np.float64(decode(fetch(buffer, i)))

    @inner
    def magnitude(buffer: Any, i: int) -> Real:
        return abs(np.float64(decode(fetch(buffer, i))))

    @inner
    def key32(buffer: Any, i: int) -> Bits:
        return key_of_float32(decode(fetch(buffer, i)))

    @inner
    def key64(buffer: Any, i: int) -> Bits:
        return key_of_float64(np.float64(decode(fetch(buffer, i))))

    encode = _ENCODE.get(kind.name, np.float64 if kind.name == "float64" else np.float32)
    number = np.float32 if narrow else np.float64
    difference: Any = _odd_difference if kind.name in _ENCODE else _difference

    # Both choose by select and never branch, so that LLVM makes vectors of them.

    @inner
    def scale(buffer: Any, i: int, factor: float) -> None:
        raw = fetch(buffer, i)
        product = encode(number(np.float64(decode(raw)) * factor))
        product = zero if factor == 0.0 else product
        place(buffer, i, raw if factor == 1.0 else product)

    @inner
    def soften(buffer: Any, i: int, t: Real, h: Real) -> None:
        raw = fetch(buffer, i)
        x, limit = number(decode(raw)), number(t)
        size = difference(abs(x), limit / h)
        moved = encode(number(size if x > number(0) else -size))
        # A subnormal number may be all of its shift, t / h, and still weigh more than t.
        moved = zero if (number(h * abs(x)) <= limit) | (size == number(0)) else moved
        place(buffer, i, raw if (x != x) | (limit == number(0)) else moved)

    narrow_key, width = None, 8 * zero.itemsize
    if kind.name in _STORAGE:
        narrow_key, signed_key = _narrow_keys(kind.name, fetch)
    else:
        signed_key_of_number = signed_key_of_float32 if narrow else signed_key_of_float64

        @inner
        def signed_key(buffer: Any, i: int) -> Bits:
            return signed_key_of_number(fetch(buffer, i))

    return Codec(unit, magnitude, value, key32, key64, signed_key, keep, drop, scale, soften, narrow_key, width)


_LARGEST = {"float16": 0x7C00, "bfloat16": 0x7F80, "float8_e4m3fn": 0x7E, "float8_e5m2": 0x7C}
"""Bits of the largest magnitude that is a number: infinity, where there is one."""


def _narrow_keys(name: str, fetch: Function) -> tuple[Function, Function]:
    """Keys of floats of 16 or 8 bits: of their magnitudes, and of signed numbers."""
    word = np.dtype(_STORAGE[name]).type
    nan, top, largest = np.iinfo(word).max, word(1 << (np.iinfo(word).bits - 1)), word(_LARGEST[name])
    below_top = word(top - 1)

    @inner
    def narrow_key(buffer: Any, i: int) -> Bits:
        size = word(fetch(buffer, i) & below_top)
        return word(nan) if size > largest else size

    @inner
    def signed_key(buffer: Any, i: int) -> Bits:
        bits = word(fetch(buffer, i))
        size = word(bits & below_top)
        if size > largest:
            return word(nan)
        return word(~bits) if bits != size and size != word(0) else word(size | top)

    return narrow_key, signed_key


def _integer_codec(unit: np.dtype, fetch: Function, place: Function, kind: Kind) -> Codec:
    zero = np.dtype(kind.name).type(0)
    keep, drop = _droppers(fetch, place, zero)
    width = 8 * zero.itemsize
    word = np.dtype(f"u{zero.itemsize}").type
    top = word(1 << (width - 1))

    @inner
    def value(buffer: Any, i: int) -> Real:
        return np.float64(fetch(buffer, i))

    @inner
    def magnitude(buffer: Any, i: int) -> Real:
        return abs(np.float64(fetch(buffer, i)))

    @inner
    def key32(buffer: Any, i: int) -> Bits:
        return key_of_float32(np.float64(fetch(buffer, i)))

    @inner
    def float_key64(buffer: Any, i: int) -> Bits:
        return key_of_float64(np.float64(fetch(buffer, i)))

    if kind.family == "int":

        @inner
        def signed_key(buffer: Any, i: int) -> Bits:
            return word(word(fetch(buffer, i)) ^ top)

        @inner
        def exact_key(buffer: Any, i: int) -> Bits:
            bits = word(fetch(buffer, i))
            return word((~bits) + word(1)) if bits >= top else bits
    else:

        @inner
        def signed_key(buffer: Any, i: int) -> Bits:
            return fetch(buffer, i)

        exact_key = signed_key

    @inner
    def scale(buffer: Any, i: int, factor: float) -> None:
        pass  # integers are never scaled: refused before any backend is called

    @inner
    def soften(buffer: Any, i: int, t: Real, h: Real) -> None:
        pass

    key64 = exact_key if kind.is_wide_integer else float_key64
    return Codec(unit, magnitude, value, key32, key64, signed_key, keep, drop, scale, soften, exact_key, width)


# Magnitudes of complex numbers are the same as norms of the two real ones that they are made of, bit by bit: they are
# measured as these where they lie line by line.


@inner
def _length(re: Real, im: Real) -> Real:
    """The root of ``re ** 2 + im ** 2``, of float64 magnitudes: as `lines` measures a block of two, NaN if one is."""
    total = re * re + im * im
    # Zeros pass this test by arithmetic: a processor cannot foretell a branch for them.
    if SAFE_LEAST <= total + np.float64(re + im == 0.0) < np.inf:
        return np.sqrt(total)
    top = re if re > im else im
    if np.isnan(total) or np.isinf(top):
        return total
    re, im = re / top, im / top
    return top * np.sqrt(re * re + im * im)


@inner
def _length_for_float32(re: Real, im: Real) -> Real:
    """A float64 that is rounded to float32 as the root of ``re ** 2 + im ** 2`` is, of float32 magnitudes.

    Their squares are exact, and the rounded sum and its root are on the same side of the middle between two float32 as
    the numbers that they stand for, or on that middle.
    """
    total = re * re + im * im
    root = np.sqrt(total)
    other = 2.0 * root - np.float64(np.float32(root))  # the other neighbour, where the root is in the middle
    if np.float64(np.float32(other)) == other and other != root:
        more = re * re if re > im else im * im
        less = im * im if re > im else re * re
        left = (total - root * root) + (less - (total - more))  # all of it is exact
        if left != 0.0:
            return root * (1.0 + (2.0**-52 if left > 0.0 else -(2.0**-52)))
    return root


def _complex_codec(unit: np.dtype, step: int, fetch: Function, place: Function, kind: Kind) -> Codec:
    scalar = np.dtype(_COMPLEX[kind.name]).type
    zero = scalar(0)
    keep_part, drop_part = _droppers(fetch, place, zero)
    number = np.float32 if kind.norm == "float32" else np.float64
    length = _length_for_float32 if kind.norm == "float32" else _length

    @inner
    def magnitude(buffer: Any, i: int) -> Real:
        return length(abs(np.float64(fetch(buffer, i))), abs(np.float64(fetch(buffer, i + step))))

    @inner
    def key32(buffer: Any, i: int) -> Bits:
        return key_of_float32(magnitude(buffer, i))

    @inner
    def key64(buffer: Any, i: int) -> Bits:
        return key_of_float64(magnitude(buffer, i))

    @inner
    def keep(buffer: Any, i: int, kept: bool) -> None:
        for part in (i, i + step):
            keep_part(buffer, part, kept)

    @inner
    def drop(buffer: Any, i: int, kept: bool) -> None:
        for part in (i, i + step):
            drop_part(buffer, part, kept)

    @inner
    def scale(buffer: Any, i: int, factor: float) -> None:
        for part in (i, i + step):
            raw = fetch(buffer, part)
            product = scalar(np.float64(raw) * factor)
            product = zero if factor == 0.0 else product
            place(buffer, part, raw if factor == 1.0 else product)

    @inner
    def soften(buffer: Any, i: int, t: Real, h: Real) -> None:
        size, limit = magnitude(buffer, i), np.float64(t)
        norm, weighted = number(size), number(size * h)
        if np.isnan(norm) or limit == 0.0 or (np.isinf(norm) and not np.isinf(limit)):
            return
        scale(buffer, i, 0.0 if weighted <= limit else (size - limit / h) / size)

    return Codec(unit, magnitude, magnitude, key32, key64, key64, keep, drop, scale, soften, None, 64)
