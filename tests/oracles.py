"""What every operation must give, as obvious Python loops in exact arithmetic.

Numbers are Fractions (mpmath where a root or a power is no Fraction), so that no oracle
rounds on the way; rounding to a format happens once, at the end. Slow on purpose, and
independent of npscope: nothing of it is imported here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import mpmath
import numpy as np

INF = math.inf
NAN = math.nan

# --- formats -------------------------------------------------------------------------------------


class Format(NamedTuple):
    """Binary floating format: significand bits, exponent of the smallest subnormal, 2**top overflows."""

    bits: int
    lowest: int
    top: int


FORMATS = {
    "float8_e4m3fn": Format(4, -9, 9),
    "float8_e5m2": Format(3, -16, 16),
    "float16": Format(11, -24, 16),
    "bfloat16": Format(8, -133, 128),
    "float32": Format(24, -149, 128),
    "float64": Format(53, -1074, 1024),
    "complex64": Format(24, -149, 128),
    "complex128": Format(53, -1074, 1024),
}


def norm_dtype(*dtypes: Any) -> str:
    """The dtype in which blocks of these dtypes compete: float64 as soon as one of them needs it."""
    wide = ("float64", "complex128", "int32", "uint32", "int64", "uint64")
    return "float64" if any(np.dtype(d).name in wide for d in dtypes) else "float32"


def quantum(value: Fraction, form: Format) -> Fraction:
    """Distance between neighbouring numbers of the format at `value`."""
    value = abs(value)
    if value == 0:
        return Fraction(2) ** form.lowest
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > value:
        exponent -= 1
    return Fraction(2) ** max(exponent - form.bits + 1, form.lowest)


def rounded(value: Fraction, name: str) -> float:
    """The number of the format nearest to `value`, ties to even; inf beyond the range."""
    form = FORMATS[name]
    step = quantum(value, form)
    result = round(value / step) * step  # round() of a Fraction is half to even
    if abs(result) >= Fraction(2) ** form.top:
        return INF if result > 0 else -INF
    return float(result)


def ulps(got: float, exact: Fraction, name: str) -> float:
    """|got - exact| in units of the spacing at `exact`; an inf counts as the first number out of range."""
    form = FORMATS[name]
    if math.isinf(got):
        limit = Fraction(2) ** form.top
        return 0.0 if exact * (1 if got > 0 else -1) >= limit - quantum(limit / 2, form) / 2 else INF
    return float(abs(Fraction(float(got)) - exact) / quantum(exact, form))


# --- numbers -------------------------------------------------------------------------------------


def number(x: Any) -> Any:
    """A NumPy scalar as int, float or complex, exactly."""
    kind = np.dtype(x.dtype).kind
    return int(x) if kind in "iu" else complex(x) if kind == "c" else float(x)


def is_nan(x: Any) -> bool:
    """NaN, or a complex number with a NaN part."""
    return x != x


def is_inf(x: Any) -> bool:
    """An infinity, or a complex number with an infinite part."""
    return not isinstance(x, int) and (math.isinf(x.real) or math.isinf(x.imag))


def square(x: Any) -> Fraction:
    """|x|**2, exactly."""
    if isinstance(x, complex):
        return Fraction(x.real) ** 2 + Fraction(x.imag) ** 2
    return Fraction(x) ** 2


def root(value: Fraction) -> Fraction:
    """The square root: exact where it is rational, else off by less than 2**-1200 and on the right side of it."""
    scaled = value.numerator * 4**1200 // value.denominator
    floor = math.isqrt(scaled)
    exact = floor * floor * value.denominator == value.numerator * 4**1200
    return Fraction(floor, 2**1200) if exact else Fraction(2 * floor + 1, 2**1201)


def fraction(x: mpmath.mpf) -> Fraction:
    """An mpmath number as a Fraction, exactly."""
    sign, mantissa, exponent, _ = x._mpf_
    value = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return -value if sign else value


# --- norms ---------------------------------------------------------------------------------------


def exact_norm(elements: Sequence[Any], ord: float) -> Fraction:
    """The norm of finite numbers, to 300 bits or better."""
    squares = [square(x) for x in elements]
    if not squares:
        return Fraction(0)
    if ord == INF:
        return root(max(squares))
    if ord == 2:
        return root(sum(squares, Fraction(0)))
    if ord == 1:
        return sum((root(s) for s in squares), Fraction(0))
    with mpmath.workprec(300):
        sizes = [mpmath.mpf(s.numerator) / s.denominator for s in squares]
        return fraction(mpmath.fsum(s ** (mpmath.mpf(ord) / 2) for s in sizes) ** (1 / mpmath.mpf(ord)))


def norm(elements: Sequence[Any], ord: float, name: str) -> float:
    """The correctly rounded norm: NaN if one element is NaN, else inf if one is infinite."""
    if any(is_nan(x) for x in elements):
        return NAN
    if any(is_inf(x) for x in elements):
        return INF
    return rounded(exact_norm(elements, ord), name)


# --- geometry ------------------------------------------------------------------------------------

Index = tuple[int, ...]


class Leaf(NamedTuple):
    """An array cut into blocks; aligned_grid[j] == own_grid[order[j]]."""

    data: np.ndarray
    block: Index
    order: Index | None = None


class Part(NamedTuple):
    """Leaves whose blocks join, and the scope that tiles their aligned grid; `order` permutes the scope grid."""

    leaves: list[Leaf]
    scope: Index
    order: Index | None = None


class Piece(NamedTuple):
    """The elements that leaf `leaf` of part `part` gives to one block."""

    part: int
    leaf: int
    where: tuple[slice, ...]


Block = list[Piece]


def one(x: np.ndarray, block: Sequence[int], scope: Sequence[int] = ()) -> list[Part]:
    """The problem of a single array."""
    return [Part([Leaf(x, tuple(block))], tuple(scope))]


def tile_sizes(shape: Sequence[int], tile: Sequence[int], fill: int) -> Index:
    """`tile` with missing axes filled and -1 replaced by the whole axis."""
    full = tuple(tile) + (fill,) * (len(shape) - len(tile))
    return tuple(max(1, n) if t == -1 else t for n, t in zip(shape, full, strict=True))


def grid_of(shape: Sequence[int], tile: Sequence[int]) -> Index:
    """Tiles along each axis."""
    return tuple(n // t for n, t in zip(shape, tile, strict=True))


def indices(shape: Sequence[int]) -> Iterator[Index]:
    """All indices of an array of this shape, row-major."""
    return itertools.product(*(range(n) for n in shape))


def block_sizes(leaf: Leaf) -> Index:
    """The block shape of a leaf, -1 and () resolved."""
    return tile_sizes(leaf.data.shape, leaf.block, 1)


def own_index(aligned: Index, order: Index | None) -> Index:
    """The index in a part's own axes of what stands at `aligned`."""
    if order is None:
        return aligned
    own = [0] * len(aligned)
    for position, axis in enumerate(order):
        own[axis] = aligned[position]
    return tuple(own)


def aligned(shape: Index, order: Index | None) -> Index:
    """A part's grid in the common order of axes."""
    return shape if order is None else tuple(shape[axis] for axis in order)


def block_grid(part: Part) -> Index:
    """The aligned block grid of a part."""
    leaf = part.leaves[0]
    return aligned(grid_of(leaf.data.shape, block_sizes(leaf)), leaf.order)


def scope_grid(parts: Sequence[Part]) -> Index:
    """The aligned scope grid."""
    part = parts[0]
    grid = block_grid(part)
    return aligned(grid_of(grid, tile_sizes(grid, part.scope, -1)), part.order)


def block_at(part_number: int, part: Part, index: Index) -> Block:
    """The pieces of the block at `index` of the aligned block grid."""
    pieces = []
    for number_, leaf in enumerate(part.leaves):
        sizes = block_sizes(leaf)
        own = own_index(index, leaf.order)
        where = tuple(slice(i * b, (i + 1) * b) for i, b in zip(own, sizes, strict=True))
        pieces.append(Piece(part_number, number_, where))
    return pieces


def competitors(parts: Sequence[Part], scope: Index) -> list[Block]:
    """The blocks that compete in one scope: part by part, row-major inside each part's scope."""
    blocks = []
    for number_, part in enumerate(parts):
        sizes = tile_sizes(block_grid(part), part.scope, -1)
        first = own_index(scope, part.order)
        for inside in indices(sizes):
            index = tuple(f * s + i for f, s, i in zip(first, sizes, inside, strict=True))
            blocks.append(block_at(number_, part, index))
    return blocks


def all_scopes(parts: Sequence[Part]) -> Iterator[tuple[Index, list[Block]]]:
    """Every scope with its competitors."""
    for scope in indices(scope_grid(parts)):
        yield scope, competitors(parts, scope)


def blocks_per_scope(parts: Sequence[Part]) -> int:
    """Blocks that compete in a scope."""
    return sum(math.prod(tile_sizes(block_grid(part), part.scope, -1)) for part in parts)


def elements(parts: Sequence[Part], block: Block) -> list[Any]:
    """The numbers of a block."""
    return [number(x) for piece in block for x in parts[piece.part].leaves[piece.leaf].data[piece.where].flat]


def leaf_dtypes(parts: Sequence[Part]) -> list[np.dtype]:
    """The dtypes of all arrays."""
    return [leaf.data.dtype for part in parts for leaf in part.leaves]


# --- ranking -------------------------------------------------------------------------------------


def ranking(values: Sequence[Any]) -> list[int]:
    """Positions by (value descending, position ascending), NaN first."""
    return sorted(range(len(values)), key=lambda i: (not is_nan(values[i]), 0 if is_nan(values[i]) else -values[i], i))


def rank_values(parts: Sequence[Part], blocks: Sequence[Block], ord: float) -> list[Any]:
    """What the blocks of one scope rank by: rounded norms; exact magnitudes for single 64-bit integers."""
    dtypes = leaf_dtypes(parts)
    values = [elements(parts, block) for block in blocks]
    if all(d.name in ("int64", "uint64") for d in dtypes) and all(len(v) == 1 for v in values):
        return [abs(v[0]) for v in values]
    return [norm(v, ord, norm_dtype(*dtypes)) for v in values]


def per_scope(value: Any, parts: Sequence[Part]) -> np.ndarray:
    """A number for each scope."""
    return np.broadcast_to(np.asarray(value), scope_grid(parts))


def scope_norms(parts: Sequence[Part], ord: float = 2) -> np.ndarray:
    """(*scope grid, blocks per scope) table of rounded norms."""
    name = norm_dtype(*leaf_dtypes(parts))
    table = [[norm(elements(parts, b), ord, name) for b in blocks] for _, blocks in all_scopes(parts)]
    return np.asarray(table, dtype=name).reshape(*scope_grid(parts), blocks_per_scope(parts))


def scope_masks(parts: Sequence[Part], nnz: Any, ord: float = 2) -> dict[Index, list[bool]]:
    """True for the first `nnz` blocks of every scope in rank order."""
    counts = per_scope(nnz, parts)
    masks = {}
    for scope, blocks in all_scopes(parts):
        kept = set(ranking(rank_values(parts, blocks, ord))[: int(counts[scope])])
        masks[scope] = [i in kept for i in range(len(blocks))]
    return masks


def kth(parts: Sequence[Part], k: Any, ord: float = 2) -> np.ndarray:
    """The k-th largest rounded norm of every scope."""
    counts, name = per_scope(k, parts), norm_dtype(*leaf_dtypes(parts))
    result = np.empty(scope_grid(parts), dtype=name)
    for scope, blocks in all_scopes(parts):
        values = [norm(elements(parts, b), ord, name) for b in blocks]
        result[scope] = values[ranking(values)[int(counts[scope]) - 1]]
    return result


# --- writing -------------------------------------------------------------------------------------

Results = list[list[np.ndarray]]


def copies(parts: Sequence[Part]) -> Results:
    """Fresh arrays with the data of every leaf."""
    return [[leaf.data.copy() for leaf in part.leaves] for part in parts]


def drop(parts: Sequence[Part], keep: Callable[[Index, int, Block], bool]) -> Results:
    """The data with +0.0 in every block that `keep` does not want."""
    results = copies(parts)
    for scope, blocks in all_scopes(parts):
        for i, block in enumerate(blocks):
            if not keep(scope, i, block):
                for piece in block:
                    results[piece.part][piece.leaf][piece.where] = 0
    return results


def keep_largest(parts: Sequence[Part], nnz: Any, ord: float = 2, scores: Sequence[Part] | None = None) -> Results:
    """The data with exactly `nnz` blocks of each scope kept."""
    masks = scope_masks(parts if scores is None else scores, nnz, ord)
    return drop(parts, lambda scope, i, block: masks[scope][i])


def hard_threshold(parts: Sequence[Part], t: Any, ord: float = 2, scores: Sequence[Part] | None = None) -> Results:
    """The data without the blocks of norm below the threshold of their scope; NaN stays."""
    source = parts if scores is None else scores
    name = norm_dtype(*leaf_dtypes(source))
    limits = per_scope(t, parts).astype(name)
    return drop(parts, lambda s, i, block: not norm(elements(source, block), ord, name) < float(limits[s]))


def element_masks(parts: Sequence[Part], masks: dict[Index, list[bool]]) -> Results:
    """Bool arrays of the shapes of the data, True where kept."""
    results = [[np.zeros(leaf.data.shape, dtype=bool) for leaf in part.leaves] for part in parts]
    for scope, blocks in all_scopes(parts):
        for kept, block in zip(masks[scope], blocks, strict=True):
            for piece in block:
                results[piece.part][piece.leaf][piece.where] = kept
    return results


# --- single arrays -------------------------------------------------------------------------------


def block_norms(x: np.ndarray, block: Sequence[int], ord: float = 2) -> np.ndarray:
    """Rounded norm of every block, over the block grid."""
    parts = one(x, block)
    name = norm_dtype(x.dtype)
    result = np.empty(block_grid(parts[0]), dtype=name)
    for index in indices(result.shape):
        result[index] = norm(elements(parts, block_at(0, parts[0], index)), ord, name)
    return result


def block_mask(x: np.ndarray, nnz: Any, block: Sequence[int], scope: Sequence[int], ord: float = 2) -> np.ndarray:
    """Bool block grid, True for the kept blocks."""
    parts = one(x, block, scope)
    sizes = block_sizes(parts[0].leaves[0])
    result = np.zeros(block_grid(parts[0]), dtype=bool)
    masks = scope_masks(parts, nnz, ord)
    for place, blocks in all_scopes(parts):
        for kept, blk in zip(masks[place], blocks, strict=True):
            result[tuple(s.start // b for s, b in zip(blk[0].where, sizes, strict=True))] = kept
    return result


def hard_threshold_blocks(x: np.ndarray, t: Any, block: Sequence[int], ord: float = 2) -> np.ndarray:
    """`x` without the blocks of norm below their threshold (one number for each block)."""
    norms = block_norms(x, block, ord)
    keep = ~(norms < np.broadcast_to(np.asarray(t), norms.shape).astype(norms.dtype))
    result = x.copy()
    sizes = tile_sizes(x.shape, block, 1)
    for index in indices(norms.shape):
        if not keep[index]:
            result[tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, sizes, strict=True))] = 0
    return result


def along(a: np.ndarray, axis: int | None) -> tuple[np.ndarray, Index]:
    """(rows to rank, shape of the result)."""
    if axis is None:
        return a.reshape(1, -1), ()
    moved = np.moveaxis(a, axis, -1)
    return moved.reshape(-1, moved.shape[-1]), moved.shape[:-1]


def kth_largest(a: np.ndarray, k: Any, axis: int | None = -1) -> np.ndarray:
    """The k-th largest signed value; zeros come out as +0.0."""
    rows, shape = along(a, axis)
    counts = np.broadcast_to(np.asarray(k), shape).reshape(-1)
    result = np.empty(len(rows), dtype=a.dtype)
    for i, row in enumerate(rows):
        values = [number(x) for x in row]
        chosen = row[ranking(values)[int(counts[i]) - 1]]
        result[i] = chosen if chosen != 0 else 0
    return result.reshape(shape)


def topk_mask(a: np.ndarray, k: Any, axis: int | None = -1) -> np.ndarray:
    """True for the k largest signed values, ties by position."""
    rows, shape = along(a, axis)
    counts = np.broadcast_to(np.asarray(k), shape).reshape(-1)
    result = np.zeros(rows.shape, dtype=bool)
    for i, row in enumerate(rows):
        result[i, ranking([number(x) for x in row])[: int(counts[i])]] = True
    return result.reshape(a.shape) if axis is None else np.moveaxis(result.reshape(*shape, -1), -1, axis)


def between(upper: Any, lower: Any, weight: float, name: str) -> float:
    """(upper + weight * lower) / (1 + weight) of finite numbers, rounded to the format."""
    w = Fraction(weight)
    return rounded((Fraction(upper) + w * Fraction(lower)) / (1 + w), name)


# --- shrinkage -----------------------------------------------------------------------------------


def shrink_factors(v: Sequence[Any], t: float, name: str, h: Sequence[Any] | None = None) -> list[Fraction] | None:
    """What each element is multiplied by; None where the block stays bit for bit.

    `t` is already in the norm's format `name`. The zero set is decided on the rounded norm.
    """
    if any(is_nan(x) for x in v) or t == 0:
        return None
    if any(is_inf(x) for x in v):
        return [Fraction(0)] * len(v) if t == INF else None
    weights = [Fraction(1)] * len(v) if h is None else [Fraction(x) for x in h]
    size = root(sum((w * w * square(x) for w, x in zip(weights, v, strict=True)), Fraction(0)))
    size_rounded = rounded(size, name)
    if math.isinf(size_rounded) and t != INF:
        return None
    if size_rounded <= t:
        return [Fraction(0)] * len(v)
    if h is None:
        return [1 - Fraction(t) / size] * len(v)
    return _conditioned_factors([square(x) for x in v], weights, Fraction(t), size)


def _conditioned_factors(squares: list[Fraction], h: list[Fraction], t: Fraction, size: Fraction) -> list[Fraction]:
    """h / (h + mu), mu by bisection of its logarithm: ``mu * ||h v / (h + mu)|| == t``, and the left side grows."""
    with mpmath.workprec(220):
        hs = [mpmath.mpf(x.numerator) / x.denominator for x in h]
        vs = [mpmath.sqrt(mpmath.mpf(x.numerator) / x.denominator) for x in squares]
        limit = mpmath.mpf(t.numerator) / t.denominator
        gap = mpmath.mpf((size - t).numerator) / (size - t).denominator
        low, high = limit * min(hs) / gap, limit * max(hs) / gap
        for _ in range(180):
            mu = mpmath.sqrt(low * high)
            if mu * mpmath.norm([a * x / (a + mu) for a, x in zip(hs, vs, strict=True)]) < limit:
                low = mu
            else:
                high = mu
        return [fraction(a / (a + high)) for a in hs]


def objective(x: Sequence[float], v: Sequence[float], t: float, h: Sequence[float]) -> mpmath.mpf:
    """1/2 (x - v)' H (x - v) + t ||x||."""
    with mpmath.workprec(200):
        quadratic = mpmath.fsum(
            mpmath.mpf(c) * (mpmath.mpf(a) - mpmath.mpf(b)) ** 2 for a, b, c in zip(x, v, h, strict=True)
        )
        return quadratic / 2 + mpmath.mpf(t) * mpmath.norm([mpmath.mpf(a) for a in x])


def best_k_sparse(x: np.ndarray, nnz: int, blocks: Sequence[Sequence[int]]) -> Fraction:
    """The least squared distance from `x` to a vector with at most `nnz` of these blocks non-zero."""
    costs = [sum((square(number(x[i])) for i in block), Fraction(0)) for block in blocks]
    total = sum(costs, Fraction(0))
    return min(
        total - sum((costs[i] for i in kept), Fraction(0)) for kept in itertools.combinations(range(len(costs)), nnz)
    )
