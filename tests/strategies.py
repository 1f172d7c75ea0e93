"""Hypothesis strategies and generators of hostile data: shapes, blocks, scopes, layouts, dtypes.

Geometry is drawn by Hypothesis, so that it shrinks; the numbers of an array come from a
drawn kind and seed, because large lists of drawn floats are slow and shrink no better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import oracles as o
from hypothesis import strategies as st

HALVES = ("float16", "bfloat16")
QUARTERS = ("float8_e4m3fn", "float8_e5m2")
FLOATS = (*QUARTERS, *HALVES, "float32", "float64")
COMPLEX = ("complex64", "complex128")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
ALL_DTYPES = (*FLOATS, *COMPLEX, *INTEGERS)
EXACT_DTYPES = (*QUARTERS, *HALVES, "float32", "int8", "int16", "uint8", "uint16")
"""Real dtypes below float64: their norms are correctly rounded and their masks equal everywhere."""
SHRINKABLE = (*HALVES, "float32", "float64", *COMPLEX)

_ML = {name: getattr(ml_dtypes, name) for name in (*QUARTERS, "bfloat16")}

NAN_BITS = {
    "float8_e4m3fn": (0x7F, 0xFF),
    "float8_e5m2": (0x7D, 0x7E, 0xFF),
    "float16": (0x7E00, 0x7C01, 0xFE01, 0xFFFF),
    "bfloat16": (0x7FC0, 0x7F81, 0xFFFF),
    "float32": (0x7FC00000, 0x7F800001, 0xFFC12345, 0xFFFFFFFF),
    "float64": (0x7FF8 << 48, (0x7FF0 << 48) + 1, (0xFFF8 << 48) + 0x12345, (1 << 64) - 1),
}


def dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name, those of ml_dtypes included."""
    return np.dtype(_ML.get(name, name))


def bits(x: np.ndarray) -> np.ndarray:
    """The bytes of every element: equal if and only if the arrays are equal bit for bit."""
    x = np.asarray(x)
    return np.frombuffer(x.tobytes(), dtype=np.uint8).reshape(*x.shape, x.dtype.itemsize)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Same dtype, shape and bytes."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- data ----------------------------------------------------------------------------------------


def _normal(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.standard_normal(size)


def _bf16_quantised(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.standard_normal(size).astype(ml_dtypes.bfloat16).astype(np.float64)


def _symmetric(rng: np.random.Generator, size: int) -> np.ndarray:
    half = rng.standard_normal(size)
    return np.concatenate([half, -half])[rng.permutation(2 * size)][:size]


def _permuted_blocks(rng: np.random.Generator, size: int) -> np.ndarray:
    base = rng.choice([0.1, 0.2, 0.3, 0.7], size=min(size, 4) or 1)
    return np.concatenate([rng.permutation(base) for _ in range(-(-max(size, 1) // len(base)))])[:size]


def _tied_norms(rng: np.random.Generator, size: int) -> np.ndarray:
    """1 + 2**-24 and its neighbours in sums: exact midpoints of float32 for ord 1."""
    return rng.choice([1.0, 2.0**-24, 1 + 2.0**-23, 3 * 2.0**-24, 0.0], size=size)


def _mixed_infinities(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.choice([np.inf, -np.inf, 1.0, 0.0, -2.0], size=size)


DATA: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": _normal,
    "constant": lambda rng, size: np.full(size, rng.choice([0.0, -0.0, 0.1, -3.0])),
    "two_valued": lambda rng, size: rng.choice([0.25, -0.5], size=size),
    "symmetric": _symmetric,
    "bf16_quantised": _bf16_quantised,
    "permuted_blocks": _permuted_blocks,
    "sorted": lambda rng, size: np.sort(rng.standard_normal(size)),
    "heavy_tailed": lambda rng, size: rng.standard_cauchy(size) ** 3,
    "signed_zeros": lambda rng, size: rng.choice([0.0, -0.0, 1.0], size=size, p=[0.4, 0.4, 0.2]),
    "infinities": _mixed_infinities,
    "tied_norms": _tied_norms,
}


def _floats(kind: str, name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    info = ml_dtypes.finfo(dtype(name))
    with np.errstate(all="ignore"):
        if kind == "nan_payloads":
            x = rng.standard_normal(size).astype(dtype(name))
            raw = x.view(f"u{x.itemsize}")
            raw[rng.random(size) < 0.3] = rng.choice(np.asarray(NAN_BITS[name], dtype=raw.dtype))
            return x
        if kind == "subnormal":
            return (rng.integers(-3, 4, size) * float(info.smallest_subnormal)).astype(dtype(name))
        if kind == "near_overflow":
            return (rng.choice([1.0, -1.0, 0.75, 0.5], size=size) * float(info.max)).astype(dtype(name))
        return DATA[kind](rng, size).astype(dtype(name))


def _integers(kind: str, name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    info = np.iinfo(name)
    if kind in ("near_overflow", "infinities", "nan_payloads"):
        extremes = [info.min, info.min + 1, info.max, info.max - 1, info.max // 2]
        return rng.choice(np.asarray(extremes, dtype=name), size=size)
    if kind in ("constant", "two_valued", "permuted_blocks", "tied_norms", "signed_zeros", "symmetric"):
        return rng.integers(max(info.min, -2), 3, size).astype(name)
    return rng.integers(info.min, info.max, size, dtype=name, endpoint=True)


KINDS = (*DATA, "nan_payloads", "subnormal", "near_overflow")


def hostile(kind: str, shape: Sequence[int], name: str, seed: int) -> np.ndarray:
    """An array of one of `KINDS` of data."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    size = math.prod(shape)
    if name in INTEGERS:
        return _integers(kind, name, rng, size).reshape(shape)
    if name in COMPLEX:
        part = "float32" if name == "complex64" else "float64"
        x = np.empty(size, dtype=name)
        x.real, x.imag = _floats(kind, part, rng, size), _floats(kind, part, rng, size)
        return x.reshape(shape)
    return _floats(kind, name, rng, size).reshape(shape)


# --- layouts -------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How an array lies in a larger base: order of axes in memory, step and margin of each axis."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    margins: tuple[int, ...]


class Placed(NamedTuple):
    """A window `view` of `base` that holds the data; `visited` marks its cells in the base."""

    view: np.ndarray
    base: np.ndarray
    visited: np.ndarray


def place(x: np.ndarray, layout: Layout, fill: Any = 1) -> Placed:
    """`x` written into a window of a fresh base filled with `fill`."""
    sizes = [n * abs(s) + m for n, s, m in zip(x.shape, layout.steps, layout.margins, strict=True)]
    base = np.full([sizes[a] for a in layout.order], fill, dtype=x.dtype)
    visited = np.zeros(base.shape, dtype=bool)
    windows = []
    for array in (base, visited):
        opened = array.transpose(np.argsort(layout.order)) if x.ndim else array[...]
        for axis, (n, step, margin) in enumerate(zip(x.shape, layout.steps, layout.margins, strict=True)):
            index = [slice(None)] * x.ndim
            stop = margin + n * abs(step)
            index[axis] = slice(margin, stop)
            opened = opened[tuple(index)]
            index[axis] = slice(None, None, step)
            opened = opened[tuple(index)]
        windows.append(opened)
    windows[0][...] = x
    windows[1][...] = True
    return Placed(windows[0], base, visited)


@st.composite
def layouts(draw: st.DrawFn, ndim: int) -> Layout:
    """Any order of axes, steps of 1, 2 or 3 in both directions, margins in front."""
    order = tuple(draw(st.permutations(range(ndim))))
    steps = tuple(draw(st.sampled_from([1, 1, 2, -1, -2, 3])) for _ in range(ndim))
    margins = tuple(draw(st.sampled_from([0, 0, 1])) for _ in range(ndim))
    return Layout(order, steps, margins)


# --- problems ------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """An array with its block and scope, and the blocks per scope."""

    x: np.ndarray
    block: tuple[int, ...]
    scope: tuple[int, ...]
    count: int
    grid: tuple[int, ...]


_AXES = {  # (scopes, blocks in a scope, block size) along one axis, by number of axes
    1: [(g, n, b) for g in (1, 2, 3) for n in (1, 2, 4, 7) for b in (1, 2, 3, 5)] + [(1, 40, 1), (1, 1, 33)],
    2: [(g, n, b) for g in (1, 2) for n in (1, 2, 3) for b in (1, 2, 3)],
    3: [(g, n, b) for g in (1, 2) for n in (1, 2) for b in (1, 2)] + [(1, 3, 1), (1, 1, 3)],
    4: [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)],
    5: [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)],
}


@st.composite
def geometries(
    draw: st.DrawFn, max_axes: int = 5, empty: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """(shape, block, scope, blocks per scope): 0 to `max_axes` axes, sometimes empty, sometimes with -1."""
    ndim = draw(st.integers(0, max_axes))
    axes = [draw(st.sampled_from(_AXES[max(ndim, 1)])) for _ in range(ndim)]
    if empty and ndim and draw(st.integers(0, 15)) == 0:
        axes[draw(st.integers(0, ndim - 1))] = (0, 1, 1)
    shape = tuple(g * n * b for g, n, b in axes)
    block = tuple(-1 if g * n == 1 and draw(st.booleans()) else b for g, n, b in axes)
    scope = tuple(-1 if g == 1 and draw(st.booleans()) else n for g, n, _ in axes)
    while scope and scope[-1] == -1 and draw(st.booleans()):
        scope = scope[:-1]
    if all(b == 1 for b in block) and draw(st.booleans()):
        block = ()
    return shape, block, scope, math.prod(n for _, n, _ in axes)


@st.composite
def problems(
    draw: st.DrawFn,
    dtypes: Sequence[str] = ALL_DTYPES,
    kinds: Sequence[str] = KINDS,
    max_axes: int = 5,
    empty: bool = True,
) -> Problem:
    """Any geometry, dtype and kind of data; the array is C-contiguous (`layouts` and `place` move it)."""
    shape, block, scope, count = draw(geometries(max_axes, empty))
    name = draw(st.sampled_from(dtypes))
    x = hostile(draw(st.sampled_from(kinds)), shape, name, draw(st.integers(0, 2**20)))
    sizes = [max(1, n) if b == -1 else b for n, b in zip(shape, block or (1,) * len(shape), strict=True)]
    return Problem(x, block, scope, count, tuple(n // b for n, b in zip(shape, sizes, strict=True)))


@st.composite
def coupled_parts(
    draw: st.DrawFn,
    dtypes: Sequence[str] = ("float32",),
    kinds: Sequence[str] = KINDS,
    max_parts: int = 3,
    max_leaves: int = 2,
) -> list[o.Part]:
    """Parts whose scopes agree after their orders, each of one or more leaves whose grids agree after theirs."""
    ndim = draw(st.integers(1, 2))
    scopes = tuple(draw(st.integers(1, 3)) for _ in range(ndim))
    parts = []
    for _ in range(draw(st.integers(1, max_parts))):
        order = tuple(draw(st.permutations(range(ndim))))
        scope = tuple(draw(st.integers(1, 2)) for _ in range(ndim))
        grid = tuple(g * s for g, s in zip(o.own_index(scopes, order), scope, strict=True))
        leaves = []
        for _ in range(draw(st.integers(1, max_leaves))):
            axes = tuple(draw(st.permutations(range(ndim))))
            block = tuple(draw(st.integers(1, 2)) for _ in range(ndim))
            shape = tuple(g * b for g, b in zip(o.own_index(grid, axes), block, strict=True))
            kind = draw(st.sampled_from(kinds))
            x = hostile(kind, shape, draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**16)))
            leaves.append(o.Leaf(x, block, axes))
        parts.append(o.Part(leaves, scope, order))
    return parts


FINITE = tuple(k for k in KINDS if k not in ("infinities", "nan_payloads"))
ORDS = (1, 2, math.inf)
