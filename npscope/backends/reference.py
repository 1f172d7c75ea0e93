"""Every operation in plain array code: the oracle, and the backend of any array-API library.

Only functions of the array API standard are used, so NumPy, array_api_strict, torch, JAX
and CuPy arrays are all served, on their device. Each array is unfolded to ``(S, n, E)``
(scope, block, element); from there on an operation is its definition. Sums run in
double-double (a pair of float64), which is what makes norms correctly rounded whatever
the order; the extremely rare block that even this cannot decide is summed in fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from fractions import Fraction
from functools import partial
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from npscope.axes import regroup
from npscope.backends import CONDITIONER_RANGE, conditioner_error, derived
from npscope.dtypes import Kind, common_norm, kind_of
from npscope.errors import ConvergenceError
from npscope.tiling import Cut, Leaf, Part, Parts

NAME = "reference"

Array = Any

_SAFE_TOP, _SAFE_UNIT = 2.0**450, 2.0**600
"""Numbers within [1 / _SAFE_TOP, _SAFE_TOP] may be squared and summed; _SAFE_UNIT brings any other there."""

_UNIT = 2.0**-52

_SHORT = 1 - 2.0**-40
"""Norms below this are not 1 but for rounding."""


def _namespace_of(array: Array) -> ModuleType:
    xp: ModuleType = array_api_compat.array_namespace(array)
    return xp


def _float64(xp: ModuleType, x: Array) -> Array:
    return xp.astype(x, xp.float64)


# --- unfolding -----------------------------------------------------------------------------------


def _layout(cut: Cut) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape that splits every axis into its loops, order of these as scope + block + element loops)."""
    dims = (*cut.scope, *cut.block, *cut.element)
    memory = sorted(range(len(dims)), key=lambda i: (dims[i].axis, -dims[i].step))
    return tuple(dims[i].size for i in memory), tuple(memory.index(i) for i in range(len(dims)))


def unfold(leaf: Leaf) -> Array:
    """The elements of `leaf` as ``(S, n, E)``."""
    split, order = _layout(leaf.cut)
    array = leaf.array if leaf.origin is None else leaf.origin
    return regroup(array, split, order, (leaf.cut.scopes, leaf.cut.blocks, leaf.cut.elements))


def fold(table: Array, leaf: Leaf) -> Array:
    """The inverse of `unfold`: ``(S, n, E)`` back in the shape of the leaf's array."""
    split, order = _layout(leaf.cut)
    back = tuple(order.index(i) for i in range(len(order)))
    return regroup(table, [split[i] for i in order], back, leaf.array.shape)


def _rows(leaf: Leaf, like: Array) -> Array:
    """A leaf of numbers as ``(S, n)`` or ``(S, 1)`` on the device of `like`."""
    xp = _namespace_of(like)
    array = leaf.array
    if not array_api_compat.is_array_api_obj(array) or xp is not _namespace_of(array):
        array = xp.asarray(np.array(array), device=array_api_compat.device(like))
    return unfold(Leaf(array, leaf.cut))[:, :, 0]


def _kinds(part: Part) -> list[Kind]:
    return [kind_of(leaf.array.dtype) for leaf in part]


def _widened(x: Array) -> Array:
    """Exactly the same numbers in float64 or complex128 (64-bit integers are rounded)."""
    xp, kind = _namespace_of(x), kind_of(x.dtype)
    if kind.is_complex:
        return xp.astype(x, xp.complex128)
    return _float64(xp, x)


def _magnitudes(part: Part) -> tuple[ModuleType, Array]:
    """|x| of a part's elements in float64, ``(S, n, E)`` over all its leaves; NaN parts give NaN."""
    tables = []
    for leaf in part:
        x = _widened(unfold(leaf))
        xp = _namespace_of(x)
        size = xp.abs(x)
        if kind_of(x.dtype).is_complex:
            bad = xp.isnan(xp.real(x)) | xp.isnan(xp.imag(x))  # the hypotenuse of (inf, NaN) is inf
            size = xp.where(bad, xp.nan * xp.ones_like(size), size)
        tables.append(size)
    return xp, tables[0] if len(tables) == 1 else xp.concat(tables, axis=-1)


# --- exact sums and norms ------------------------------------------------------------------------


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """S + e == a + b exactly, s the rounded sum (Knuth 1969)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _double_double_sum(xp: ModuleType, terms: Array) -> tuple[Array, Array, Array]:
    """(hi, lo, slack) along the last axis: the sum is hi + lo up to slack, and exact where slack is 0."""
    hi, lo, slack = terms, xp.zeros_like(terms), xp.zeros_like(terms)
    while hi.shape[-1] > 1:
        if hi.shape[-1] % 2:
            pad = xp.zeros_like(hi[..., :1])
            hi, lo, slack = (xp.concat([t, pad], axis=-1) for t in (hi, lo, slack))
        hi, error = _two_sum(hi[..., 0::2], hi[..., 1::2])
        carried = lo[..., 0::2] + lo[..., 1::2]
        lo = carried + error
        slack = slack[..., 0::2] + slack[..., 1::2] + _UNIT * (xp.abs(carried) + xp.abs(lo))
    hi, lo = _two_sum(hi[..., 0], lo[..., 0])
    return hi, lo, slack[..., 0]


def _exact_sides(xp: ModuleType, terms: Array, midpoint: Array, chosen: Array, square: bool) -> Array:
    """Sign of (sum of `terms`) - (midpoint or its square) in fractions, for the `chosen` blocks."""
    signs = np.zeros(chosen.shape)
    rows, columns = xp.nonzero(chosen)
    for place in range(rows.shape[0]):
        i, j = int(rows[place]), int(columns[place])
        total = sum((Fraction(float(terms[i, j, e])) for e in range(terms.shape[-1])), Fraction(0))
        border = Fraction(float(midpoint[i, j])) ** (2 if square else 1)
        signs[i, j] = (total > border) - (total < border)
    return xp.asarray(signs, device=array_api_compat.device(terms))


def _round_to_float32(xp: ModuleType, terms: Array, hi: Array, lo: Array, slack: Array, square: bool) -> Array:
    """The float32 nearest to the sum of `terms` (or to its square root), ties to even.

    The float64 result is one of two neighbours; which one, the side of their midpoint tells.
    """
    guess = xp.astype(xp.sqrt(hi) if square else hi, xp.float32)
    for towards in (xp.inf, 0.0):
        other = xp.nextafter(guess, xp.full_like(guess, towards))
        a, b = (xp.where(xp.isinf(t), 2.0**128, _float64(xp, t)) for t in (guess, other))
        midpoint = (a + b) / 2
        border = midpoint * midpoint if square else midpoint
        side = (hi - border) + lo
        undecided = (xp.abs(side) <= slack) & (slack > 0)
        if xp.any(undecided):
            side = xp.where(undecided, _exact_sides(xp, terms, midpoint, undecided, square), side)
        crossed = side > 0 if towards else side < 0
        even = xp.astype(midpoint, xp.float32)
        guess = xp.where(crossed, other, xp.where((side == 0) & (a != b), even, guess))
    return guess


def _summed_norm(xp: ModuleType, size: Array, p: float, rounded: bool) -> tuple[Array, Array]:
    """(norm in the norm's dtype, norm in float64) of finite magnitudes ``(S, n, E)``, p in {1, 2}."""
    scale = _safe_unit(xp, size)
    scaled = size * scale if p == 2 else size
    terms = scaled * scaled if p == 2 else scaled
    hi, lo, slack = _double_double_sum(xp, terms)
    wide = xp.sqrt(hi + lo) / scale[..., 0] if p == 2 else hi + lo
    wide = xp.where(xp.isnan(wide), xp.inf, wide)  # only a sum beyond the range of float64 gets here
    if not rounded:
        return wide, wide
    # Scaled blocks are far outside the range of float32: their norm rounds to 0 or inf.
    norm = _round_to_float32(xp, terms, hi, lo, slack, p == 2)
    return xp.where(scale[..., 0] == 1, norm, xp.astype(wide, xp.float32)), wide


def _safe_unit(xp: ModuleType, size: Array) -> Array:
    """A power of four for each block that brings its magnitudes where they may be squared; mostly 1."""
    top = xp.max(size, axis=-1, keepdims=True)
    small = (top < 1 / _SAFE_TOP) & (top > 0)
    return xp.where(top > _SAFE_TOP, 1 / _SAFE_UNIT, xp.where(small, _SAFE_UNIT, xp.ones_like(top)))


def _power_norm(xp: ModuleType, size: Array, p: float, wide: bool) -> Array:
    if wide and p < 1:
        return _decimal_norm(xp, size, p)
    top = xp.max(size, axis=-1, keepdims=True)
    safe = xp.where(top > 0, top, xp.ones_like(top))
    hi, lo, _ = _double_double_sum(xp, (size / safe) ** p)
    return xp.where(top[..., 0] > 0, top[..., 0] * (hi + lo) ** (1 / p), 0.0)


def _decimal_norm(xp: ModuleType, size: Array, p: float) -> Array:
    """The same in decimals: the root multiplies the error of the sum by 1 / p, too much for float64."""
    result = np.zeros(tuple(size.shape[:2]))
    power = Decimal(p)
    with localcontext(Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])):  # an overflow is infinity
        for i, j in np.ndindex(result.shape):
            logs = [Decimal(float(size[i, j, e])).ln() for e in range(size.shape[2]) if size[i, j, e] > 0]
            if logs:
                total = sum(((x - max(logs)) * power).exp() for x in logs)
                result[i, j] = float((max(logs) + Decimal(total).ln() / power).exp())
    return xp.asarray(result, device=array_api_compat.device(size))


def _part_norms(part: Part, ord: float) -> tuple[Array, Array]:
    """(norms in the norm's dtype, the same norms in float64), each ``(S, n)``."""
    kinds = _kinds(part)
    xp, size = _magnitudes(part)
    dtype = getattr(xp, common_norm(kinds))
    finite = xp.where(xp.isfinite(size), size, 0.0)
    if size.shape[-1] == 1 or ord == math.inf:
        wide = xp.max(finite, axis=-1)
        norm = xp.astype(wide, dtype)
    elif ord in (1, 2):
        norm, wide = _summed_norm(xp, finite, ord, all(kind.rounds_correctly for kind in kinds))
    else:
        norm = wide = _power_norm(xp, finite, ord, common_norm(kinds) == "float64")
    has_inf, has_nan = xp.any(xp.isinf(size), axis=-1), xp.any(xp.isnan(size), axis=-1)

    def marked(values: Array) -> Array:
        return xp.where(has_nan, xp.nan, xp.where(has_inf, xp.inf, values))

    return marked(xp.astype(norm, dtype)), marked(wide)


def norms(parts: Parts, ord: float | None, out: Array | None = None) -> Array:
    """Norm of every block: ``(S, n)`` in the norm's dtype."""
    if ord is None:
        raise ValueError("signed values have no norm")
    with np.errstate(all="ignore"):
        tables = [_part_norms(part, ord)[0] for part in parts]
    return _side_by_side(tables)


def _side_by_side(tables: list[Array]) -> Array:
    if len(tables) == 1:
        return tables[0]
    xp = _namespace_of(tables[0])
    dtypes = [t.dtype for t in tables]
    common = xp.float64 if xp.float64 in dtypes else dtypes[0]
    return xp.concat([xp.astype(t, common) for t in tables], axis=-1)


# --- ranking -------------------------------------------------------------------------------------


def _integer_magnitudes(parts: Parts) -> Array:
    """Integers that order like the magnitudes of 64-bit integers, |-2**63| included: |x| - 1 if it fits int64."""
    tables = [unfold(part[0])[:, :, 0] for part in parts]
    xp = _namespace_of(tables[0])
    signed = [kind_of(x.dtype).family == "int" for x in tables]
    below = [~xp.where(x < 0, x, -x) if s else x for x, s in zip(tables, signed, strict=True)]
    if not all(signed):
        below = [xp.astype(x, xp.uint64) + xp.uint64(1) if s else x for x, s in zip(below, signed, strict=True)]
    return xp.concat(below, axis=-1)


def _rank_values(parts: Parts, ord: float | None) -> Array:
    """What the blocks of a scope rank by, ``(S, n)``: larger first, NaN above all."""
    if ord is None:
        return _signed_values(parts)
    if all(len(p) == 1 and p[0].cut.elements == 1 and _kinds(p)[0].is_wide_integer for p in parts):
        return _integer_magnitudes(parts)
    return norms(parts, ord)


def _signed_values(parts: Parts) -> Array:
    """The one leaf's numbers: integers as they are, floats in float64."""
    x = unfold(parts[0][0])[:, :, 0]
    with np.errstate(all="ignore"):  # a signalling NaN is a NaN
        return x if kind_of(x.dtype).is_integer else _float64(_namespace_of(x), x)


def _order(values: Array) -> Array:
    """Positions along the last axis in rank order: descending, NaN first, ties by position."""
    xp = _namespace_of(values)
    if not xp.isdtype(values.dtype, "real floating"):
        return xp.argsort(values, axis=-1, descending=True, stable=True)
    nan = xp.isnan(values)
    order = xp.argsort(xp.where(nan, xp.inf, values), axis=-1, descending=True, stable=True)
    nan_first = xp.argsort(
        xp.astype(xp.take_along_axis(nan, order, axis=-1), xp.int8), axis=-1, descending=True, stable=True
    )
    return xp.take_along_axis(order, nan_first, axis=-1)


def kth(parts: Parts, k: Leaf, ord: float | None) -> Array:
    """The k-th largest rank value of every scope: ``(S,)``."""
    order = _order(_rank_values(parts, ord))
    values = _signed_values(parts) if ord is None else norms(parts, ord)
    xp = _namespace_of(values)
    position = xp.astype(_rows(k, values), xp.int64) - 1
    chosen = xp.take_along_axis(values, xp.take_along_axis(order, position, axis=-1), axis=-1)[:, 0]
    dtype = parts[0][0].array.dtype if ord is None else getattr(xp, common_norm(k for p in parts for k in _kinds(p)))
    return xp.astype(xp.where(chosen == 0, xp.zeros_like(chosen), chosen), dtype)


midpoint = partial(derived.midpoint, kth)


def _first_ranked(parts: Parts, keep: Leaf, ord: float | None) -> Array:
    """True for the `keep` first-ranked blocks of every scope: ``(S, n)`` bool."""
    values = _rank_values(parts, ord)
    xp = _namespace_of(values)
    rank = xp.argsort(_order(values), axis=-1, stable=True)
    return rank < xp.astype(_rows(keep, values), rank.dtype)


def mask(source: Leaf, keep: Leaf, ord: float | None, out: Leaf | None = None) -> Array:
    """True for the `keep` first-ranked blocks of every scope: the array of `out`, or ``(S, n)`` bool."""
    table = _first_ranked(((source,),), keep, ord)
    if out is None:
        return table
    out.array[...] = fold(table[:, :, None], out)
    return out.array


# --- writing -------------------------------------------------------------------------------------


def _columns(parts: Parts, table: Array) -> list[tuple[Leaf, Array]]:
    """Each leaf with its columns of an ``(S, n)`` table, as ``(S, n, 1)``; ``(S, 1)`` serves every part."""
    pairs, start = [], 0
    for part in parts:
        stop = start + part[0].cut.blocks
        columns = table if table.shape[1] == 1 or len(parts) == 1 else table[:, start:stop]
        pairs += [(leaf, columns[:, :, None]) for leaf in part]
        start = stop
    return pairs


def _kept(parts: Parts, keep_mask: Array) -> list[Array]:
    results = []
    for leaf, columns in _columns(parts, keep_mask):
        x = unfold(leaf)
        results.append(fold(_namespace_of(x).where(columns, x, _namespace_of(x).zeros_like(x)), leaf))
    return results


def prune(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Sequence[Array]:
    """Zero every block of `target` but those at the `keep` first-ranked places of `source`."""
    return _kept(target, _first_ranked(source, keep, ord))


def element_masks(parts: Parts, keep: Leaf, ord: float | None) -> Sequence[Array]:
    """True for the elements of the `keep` first-ranked blocks of every scope: a bool array like each leaf."""
    kept = _columns(parts, _first_ranked(parts, keep, ord))
    sizes = [(leaf.cut.scopes, leaf.cut.blocks, leaf.cut.elements) for leaf, _ in kept]
    return [
        fold(_namespace_of(columns).broadcast_to(columns, size), leaf)
        for (leaf, columns), size in zip(kept, sizes, strict=True)
    ]


def threshold(target: Parts, source: Parts, thresholds: Leaf, ord: float | None) -> Sequence[Array]:
    """Zero the blocks of `target` whose norm in `source` is below their threshold."""
    values = norms(source, ord)
    return _kept(target, ~(values < _rows(thresholds, values)))


def apply_mask(target: Parts, mask: Leaf) -> Sequence[Array]:
    """Zero the blocks of `target` whose mask is False."""
    return _kept(target, _rows(mask, target[0][0].array))


def scale(target: Parts, multipliers: Leaf) -> Sequence[Array]:
    """Multiply blocks by a float64 each; 0 writes +0.0, 1 keeps the bits."""
    return _scaled(target, _rows(multipliers, target[0][0].array))


def _scaled(target: Parts, factors: Array) -> list[Array]:
    return [fold(_times(unfold(leaf), columns), leaf) for leaf, columns in _columns(target, factors)]


def _times(x: Array, factor: Array) -> Array:
    """X * factor by select: a factor of 1 keeps the bits of x, 0 gives +0.0."""
    xp = _namespace_of(x)
    with np.errstate(all="ignore"):
        wide = _widened(x)
        product = _complex_times(xp, wide, factor) if kind_of(x.dtype).is_complex else wide * factor
        product = xp.astype(product, x.dtype)
    return xp.where(factor == 1, x, xp.where(factor == 0, xp.zeros_like(x), product))


def _complex_times(xp: ModuleType, x: Array, factor: Array) -> Array:
    """X * factor, zeros with the signs that products of parts have, unless a part underflows.

    The imaginary part of the factor is a zero, whose sign decides that of a part that is zero beside one that is not.
    """
    factors, real, imag = xp.astype(factor, x.dtype), xp.real(x), xp.imag(x)
    turned = xp.where(imag == 0, real > 0, imag < 0)
    zero = (x == 0) & xp.isfinite(factor)
    return xp.where(zero, xp.where(factor < 0, -x, x), x * xp.where(turned, xp.conj(factors), factors))


# --- shrinkage -----------------------------------------------------------------------------------


def shrink(
    target: Parts, thresholds: Sequence[Leaf], conditioners: Parts | None, max_iter: int, rtol: float
) -> Sequence[Array]:
    """The proximal step of ``t * norm`` on every block, in the metric of `conditioners` if given."""
    metrics: Sequence[Part] = [()] * len(target) if conditioners is None else conditioners
    for leaf in (leaf for metric in metrics for leaf in metric):
        _require_conditioner(leaf.array)
    results = []
    with np.errstate(all="ignore"):
        factors = [
            None
            if _is_single(part)
            else _conditioned_factors(part, t, metric, max_iter, rtol)
            if metric
            else _shrink_factors(part, t)
            for part, t, metric in zip(target, thresholds, metrics, strict=True)
        ]
    for part, t, metric, table in zip(target, thresholds, metrics, factors, strict=True):
        start = 0
        if table is None:
            results.append(_softened(part, t, metric))
            continue
        for leaf in part:
            stop = start + leaf.cut.elements
            columns = table if table.shape[-1] == 1 else table[:, :, start:stop]
            results.append(fold(_times(unfold(leaf), columns), leaf))
            start = stop
    return results


def _require_conditioner(h: Array) -> None:
    """SpecError unless every entry of `h` is in `CONDITIONER_RANGE`."""
    xp, (low, high) = _namespace_of(h), CONDITIONER_RANGE
    if not math.prod(h.shape):
        return
    with np.errstate(invalid="ignore"):  # of NaN in a bfloat16
        least, most = float(xp.min(h)), float(xp.max(h))
    if not (least >= low and most <= high):
        raise conditioner_error(least, most)


def _is_single(part: Part) -> bool:
    """Whether the blocks are single real numbers."""
    return len(part) == 1 and part[0].cut.elements == 1 and not _kinds(part)[0].is_complex


def _rounded(x: Array, dtype: Any) -> Array:
    """Float64 in a dtype, rounded once: libraries may go by way of float32, which then can be half-way between two."""
    xp = _namespace_of(x)
    near = xp.astype(x, dtype)
    if kind_of(dtype).name not in ("float16", "bfloat16"):
        return near
    other = 2 * _float64(xp, xp.astype(x, xp.float32)) - _float64(xp, near)
    beyond = xp.astype(other, dtype)
    is_nearer = (_float64(xp, beyond) == other) & (xp.abs(other - x) < xp.abs(_float64(xp, near) - x))
    return xp.where(is_nearer, beyond, near)


def _softened(part: Part, thresholds: Leaf, metric: Part) -> Array:
    """Blocks of one real number, moved by t / h towards zero: the exact step, in one rounding."""
    x = unfold(part[0])
    xp, wide = _namespace_of(x), _widened(x)
    t = _float64(xp, _rows(thresholds, x))[:, :, None]
    h = _float64(xp, unfold(metric[0])) if metric else xp.ones_like(wide)
    with np.errstate(all="ignore"):
        moved = _rounded(xp.where(wide > 0, wide - t / h, wide + t / h), x.dtype)
        norm = _float64(xp, xp.astype(h * xp.abs(wide), getattr(xp, common_norm(_kinds(part)))))
    same = xp.isnan(wide) | (t == 0)
    return fold(xp.where(same, x, xp.where(norm <= t, xp.zeros_like(x), moved)), part[0])


def _shrink_factors(part: Part, thresholds: Leaf) -> Array:
    """What each block of `part` is multiplied by: ``(S, n, 1)`` float64."""
    norm, wide = _part_norms(part, 2)
    xp = _namespace_of(norm)
    t = _rows(thresholds, norm)
    same = xp.isnan(norm) | (t == 0) | (xp.isinf(norm) & xp.isfinite(t))
    factor = (wide - _float64(xp, t)) / wide
    return xp.where(same, 1.0, xp.where(norm <= t, 0.0, factor))[:, :, None]


def _conditioned_factors(part: Part, thresholds: Leaf, metric: Part, max_iter: int, rtol: float) -> Array:
    """What each element of `part` is multiplied by: ``(S, n, E)`` float64."""
    xp, size = _magnitudes(part)
    kinds = _kinds(part)
    h = xp.concat([_float64(xp, unfold(leaf)) for leaf in metric], axis=-1)
    t = _float64(xp, _rows(thresholds, size))
    norm, _ = _part_norms(part, 2)
    has_nan, has_inf = xp.isnan(norm), xp.isinf(norm)
    v = xp.where(xp.isfinite(size), size, 0.0)
    unit = _safe_unit(xp, v)
    # The step is homogeneous: prox of (c v, c t) is c times that of (v, t). Both factors of h v take a root of c, as
    # small elements may weigh most: beside large ones, c v of them would be subnormal.
    root = xp.sqrt(unit)
    hv, t = (h * root) * (v * root), t * unit[..., 0]
    norm, wide = _summed_norm(xp, hv, 2, all(kind.rounds_correctly for kind in kinds))
    norm = xp.astype(norm, getattr(xp, common_norm(kinds)))
    zero = xp.where(has_inf, xp.isinf(t), norm <= xp.astype(t, norm.dtype))
    same = has_nan | (t == 0) | (has_inf & xp.isfinite(t))
    open_ = ~(zero | same)
    wide, t = xp.where(open_, wide, 1.0), xp.where(open_, t, 0.5)
    hmax = xp.max(h, axis=-1, keepdims=True)
    g, w, tau = h / hmax, hv / wide[..., None], (t / wide)[..., None]
    start = ((wide - t) / wide)[..., None]
    root = _secular_root(xp, g, w, tau, start, open_[..., None], max_iter, rtol)
    return xp.where(same[..., None], 1.0, xp.where(zero[..., None], 0.0, g * root / (g * root + tau)))


def _secular_root(
    xp: ModuleType, g: Array, w: Array, tau: Array, start: Array, open_: Array, max_iter: int, rtol: float
) -> Array:
    """Sigma with ``||w / (g * sigma + tau)|| = 1``, for ``||w|| = 1``, ``0 < g <= max g = 1``, ``0 < tau < 1``.

    Newton on the reciprocal norm, which is monotone from the left end of the bracket
    ``[(1 - tau) / max g, (1 - tau) / min g]``; where it overflows, the bracket is halved, maybe beyond the root.
    """
    sigma, low, high = start, start, start / xp.min(g, axis=-1, keepdims=True)
    for _ in range(max_iter):
        q = w / (g * sigma + tau)
        norm = xp.sqrt(xp.sum(q * q, axis=-1, keepdims=True))
        slope = xp.sum(q * q * (g / (g * sigma + tau)), axis=-1, keepdims=True)
        low, high = xp.where(norm >= 1, sigma, low), xp.where(norm <= 1, sigma, high)
        newton = sigma + (norm - 1) * norm * norm / slope
        halved = xp.sqrt(low) * xp.sqrt(high)
        following = xp.where(xp.isfinite(newton), xp.minimum(xp.maximum(newton, low), high), halved)
        # From the left every step rises; one that does not has reached the rounding of the norm, unless from the right.
        falls = (following < sigma * (1 - rtol)) & (norm < _SHORT)
        open_ = open_ & ((following > sigma * (1 + rtol)) | falls | ~xp.isfinite(norm))
        sigma = following
        if not xp.any(open_):
            return sigma
    raise ConvergenceError(f"the conditioned shrink did not reach rtol = {rtol} within max_iter = {max_iter} steps")


# --- counting ------------------------------------------------------------------------------------


def count_nonzero(parts: Parts, eps: float) -> int:
    """How many elements do not satisfy ``|x| <= eps``."""
    total = 0
    for part in parts:
        xp, size = _magnitudes(part)
        total += int(xp.sum(xp.astype(~(size <= eps), xp.int64)))
    return total


def sum_squares(parts: Parts) -> float:
    """The sum of ``|x| ** 2`` of all elements, in float64."""
    total = 0.0
    for part in parts:
        xp, size = _magnitudes(part)
        with np.errstate(over="ignore", under="ignore"):
            total += float(xp.sum(xp.astype(size, xp.float64) ** 2))
    return total
