"""The loops: serial, GIL-free kernels on a range of blocks, and the arithmetic they share.

A range [i0, i1) counts blocks in row-major order of the grid (scopes outside, blocks of a
scope inside). `grid` and `elements` are int64 tables of (sizes, strides), outermost loop
first; results are dense, entry 0 for block i0. Block i lies at ``origin + place(i, grid)``.

Kernels that touch array memory are made for a codec (`kernels`, `pair_kernels`);
those that only see dense work arrays are plain functions.
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from npscope.backends.numba_cpu.arithmetic import (
    dd_add,
    dd_divide,
    dd_exp,
    dd_log,
    dd_multiply,
    limbs_add,
    limbs_sign,
    midpoint_above,
    round_root,
    two_sum,
)
from npscope.backends.numba_cpu.codecs import Codec, Function, key_of_float32, key_of_float64
from npscope.backends.numba_cpu.jit import inner, inner_any_order, kernel

INF, ONE, TWO, POWER = 0, 1, 2, 3
"""Codes of the four ways to accumulate a norm."""

EXACT_CHUNK = 1024
"""Terms of float32 magnitudes summed in plain float64 between two compensated additions."""

WIDE_CHUNK = 8
"""The same for float64 terms: 7 roundings, which keeps the norm within 4 ulp."""

DIGIT_BITS = 16
"""Bits that one radix pass over a large scope resolves."""


# --- addresses -----------------------------------------------------------------------------------


@inner
def place(i: int, nest: Any) -> Any:
    """Offset of index `i` of a loop nest."""
    offset = 0
    for d in range(nest.shape[1] - 1, 0, -1):
        size = nest[0, d]
        outer = i // size
        offset += (i - outer * size) * nest[1, d]
        i = outer
    offset += i * nest[1, 0]
    return offset


# --- from sums to norms --------------------------------------------------------------------------


@kernel
def finish_exact(hi: Any, lo: Any, square: bool, norm: Any, unsure: Any) -> int:
    """Sums to norms: `norm` (float32) and `hi` (the same in float64); counts the blocks it cannot decide.

    The sum is right to 2**-42, so its rounding is certain unless that interval holds a
    midpoint of two floats; such blocks get the lower of the two and are listed in `unsure`.
    """
    count = 0
    for i in range(norm.size):
        total = hi[i] + lo[i]
        if not np.isfinite(hi[i]):
            norm[i] = hi[i]
            continue
        wide = math.sqrt(total) if square else total
        hi[i] = wide
        below = np.float32(wide * (1 - 2.0**-42))
        norm[i] = below
        if below != np.float32(wide * (1 + 2.0**-42)):
            unsure[count] = i
            count += 1
    return count


@kernel
def finish_unsure(limbs: Any, unsure: Any, count: int, square: bool, norm: Any) -> None:
    """Round up the listed norms whose exact sum lies above the midpoint (ties to even)."""
    for row in range(count):
        i = unsure[row]
        limbs_add(limbs, row, midpoint_above(norm[i]), square, -1)
        side = limbs_sign(limbs, row)
        bits = np.float32(norm[i]).view(np.uint32)
        if side > 0 or (side == 0 and bits & np.uint32(1)):
            norm[i] = np.uint32(bits + np.uint32(1)).view(np.float32)


@kernel
def finish_wide(hi: Any, lo: Any, square: bool, norm: Any, unsure: Any) -> int:
    """Sums to norms in float64; lists the blocks whose squares over- or underflowed."""
    count = 0
    for i in range(norm.size):
        risky = square and not (1e-280 < hi[i] < np.inf) and not np.isnan(hi[i])
        total = hi[i] + lo[i] if np.isfinite(hi[i]) else hi[i]
        wide = math.sqrt(total) if square else total
        hi[i] = wide
        norm[i] = wide
        if risky:
            unsure[count] = i
            count += 1
    return count


@kernel
def finish_scaled(hi: Any, lo: Any, top: Any, p: float, norm: Any) -> None:
    """Sums of (|x| / top) ** p to norms; `hi` becomes the norm in float64."""
    precise = norm.itemsize == 8 and p < 1.0
    for i in range(norm.size):
        if top[i] == 0.0 or not np.isfinite(top[i]):
            hi[i] = top[i]
        elif precise:
            h, low = two_sum(hi[i], lo[i])
            if h == 1.0 and low == 0.0:
                hi[i] = norm[i] = top[i]
                continue
            h, low = dd_log(h, low)
            h, low = dd_divide(h, low, p)
            th, tl = dd_log(top[i], 0.0)
            h, low = dd_add(h, low, th, tl)
            if not (h < 710.0):  # NaN where the quotient itself overflows
                hi[i] = np.inf
            else:
                h, low, k = dd_exp(h, low)
                hi[i] = math.ldexp(h + low, k)
        else:
            total = hi[i] + lo[i]
            hi[i] = top[i] * (math.sqrt(total) if p == 2.0 else total ** (1.0 / p))
        norm[i] = hi[i]


@inner
def precise_power(x: float, log_top: float, log_top_low: float, p: float) -> tuple[float, float]:
    """(x / top) ** p as a double-double, 0 < x <= top or x = 0."""
    if x == 0.0:
        return 0.0, 0.0
    h, low = dd_log(x, 0.0)
    h, low = dd_add(h, low, -log_top, -log_top_low)
    h, low = dd_multiply(h, low, p, 0.0)
    h, low, k = dd_exp(h, low)
    return math.ldexp(h, k), math.ldexp(low, k)


@kernel
def finish_largest(top: Any, norm: Any) -> None:
    """Maxima, or magnitudes of single elements, to norms."""
    for i in range(norm.size):
        norm[i] = top[i]


@kernel
def take(chosen: Any, count: int, again: Any, again_wide: Any, norm: Any, wide: Any) -> None:
    """Replace the norms of the `chosen` blocks by those computed again."""
    for row in range(count):
        i = chosen[row]
        norm[i] = again[i]
        wide[i] = again_wide[i]


@kernel
def keys_of_norms(norm: Any, keys: Any) -> None:
    """Ordered integers of norms, in the width of `keys`."""
    for i in range(norm.size):
        if keys.itemsize == 4:
            keys[i] = key_of_float32(norm[i])
        else:
            keys[i] = key_of_float64(np.float64(norm[i]))


# --- selection on dense keys ---------------------------------------------------------------------


@kernel
def digit_counts(keys: Any, start: int, stop: int, prefix: Any, known: Any, shift: Any, counts: Any) -> None:
    """Add to `counts` how often each digit at `shift` occurs among the keys that match `prefix`."""
    digit = np.uint64(counts.size - 1)
    for i in range(start, stop):
        key = np.uint64(keys[i])
        if (key & known) == prefix:
            counts[(key >> shift) & digit] += 1


@kernel
def nth_key(keys: Any, start: int, n: int, k: int, counts: Any) -> tuple[Any, int]:
    """(k-th largest of n keys, how many keys equal to it are among the k largest), by radix."""
    prefix, known = np.uint64(0), np.uint64(0)
    shift = np.uint64(8 * keys.itemsize)
    while shift > np.uint64(0):
        shift -= np.uint64(8)
        counts[:] = 0
        digit_counts(keys, start, start + n, prefix, known, shift, counts)
        digit = counts.size - 1
        while counts[digit] < k:
            k -= counts[digit]
            digit -= 1
        prefix |= np.uint64(digit) << shift
        known |= np.uint64(255) << shift
    return prefix, k


@kernel
def mark(keys: Any, start: int, stop: int, limit: Any, ties: int, mask: Any) -> int:
    """Mask of keys above `limit`, and of the first `ties` keys equal to it; the ties left over."""
    for i in range(start, stop):
        key = np.uint64(keys[i])
        kept = key > limit
        if key == limit and ties > 0:
            ties -= 1
            kept = True
        mask[i] = kept
    return ties


RANKED_BY_COUNTING = 16
"""Up to this many blocks a scope, comparing all pairs beats a radix pass with its 256 counters."""


@kernel
def select_rows(keys: Any, rows: int, n: int, keep: Any, mask: Any, counts: Any) -> None:
    """Mask of the `keep` first-ranked keys of every row of n: larger first, ties by position."""
    for r in range(rows):
        start, k = r * n, keep[r]
        if k <= 0 or k >= n:
            mask[start : start + n] = k > 0
        elif n <= RANKED_BY_COUNTING:
            for i in range(start, start + n):
                rank = 0
                for j in range(start, i):
                    rank += keys[j] >= keys[i]
                for j in range(i + 1, start + n):
                    rank += keys[j] > keys[i]
                mask[i] = rank < k
        else:
            limit, ties = nth_key(keys, start, n, k, counts)
            mark(keys, start, start + n, limit, ties, mask)


@kernel
def kth_rows(keys: Any, rows: int, n: int, k: Any, found: Any, counts: Any) -> None:
    """The k-th largest key of every row of n."""
    for r in range(rows):
        limit, _ = nth_key(keys, r * n, n, k[r], counts)
        found[r] = limit


@kernel
def count_equal(keys: Any, stop: int, limit: Any) -> int:
    """How many keys equal `limit`."""
    total = 0
    for i in range(stop):
        total += np.uint64(keys[i]) == limit
    return total


@kernel
def not_below(norm: Any, thresholds: Any, mask: Any) -> None:
    """Mask of the blocks that a hard threshold keeps: not norm < threshold."""
    for i in range(norm.size):
        mask[i] = not (norm[i] < thresholds[i])


@kernel
def gather(buffer: Any, origin: int, grid: Any, i0: int, i1: int, out: Any) -> None:
    """Entries [i0, i1) of a strided grid of numbers, dense."""
    run = grid[0, -1]
    step = grid[1, -1]
    i = i0
    while i < i1:
        inner = i % run
        stop = min(i1, i + run - inner)
        at = origin + place(i, grid)
        for j in range(i, stop):
            out[j - i0] = buffer[at + (j - i) * step]
        i = stop


@kernel
def repeat_each(few: Any, n: int, skip: int, out: Any) -> None:
    """Each entry of `few` n times, without the first `skip`."""
    for i in range(out.size):
        out[i] = few[(i + skip) // n]


# --- shrinkage on dense norms --------------------------------------------------------------------


SAFE_TOP, SAFE_UNIT = 2.0**450, 2.0**600
"""Numbers within [1 / SAFE_TOP, SAFE_TOP] may be squared and summed; SAFE_UNIT brings any other there."""


@kernel
def safe_units(top: Any, unit: Any) -> None:
    """Powers of two that bring each `top` where it may be squared; 1 where it already is."""
    for i in range(top.size):
        unit[i] = 1.0
        if top[i] > SAFE_TOP:
            unit[i] = 1.0 / SAFE_UNIT
        elif 0.0 < top[i] < 1.0 / SAFE_TOP:
            unit[i] = SAFE_UNIT


@kernel
def open_conditioned(
    top: Any, unit: Any, hi: Any, lo: Any, scale: Any, t: Any, exact: bool, narrow: bool, hmin: Any, hmax: Any,
    n: Any, tau: Any, sigma: Any, low: Any, high: Any, active: Any,
) -> None:  # fmt: skip
    """Start of the secular iteration for blocks that are neither zero nor unchanged.

    In: top = ||v|| as rounded, sums hi + lo of (scale * h * unit * v) ** 2, thresholds t. Out: the bracket
    [low, high] of sigma for ``|| (hv / n) / (h / hmax * sigma + tau) || = 1``. Closed blocks get
    sigma = 0 (the block becomes zero) or tau = 0 (it stays).
    """
    for i in range(t.size):
        active[i] = False
        sigma[i], tau[i] = 1.0, 0.0
        if np.isnan(top[i]) or t[i] == 0.0:
            continue
        if np.isinf(top[i]):
            if np.isinf(t[i]):
                sigma[i], tau[i] = 0.0, 1.0
            continue
        limit = t[i] * unit[i]
        n[i] = math.sqrt(hi[i] + lo[i]) / scale[i]
        rounded = np.float64(round_root(hi[i], lo[i])) if exact and scale[i] == 1.0 else n[i]
        if narrow:
            rounded = np.float64(np.float32(rounded))
        if rounded <= limit:
            sigma[i], tau[i] = 0.0, 1.0
            continue
        tau[i] = limit / n[i]
        low[i] = (n[i] - limit) / n[i]
        high[i] = low[i] * (hmax[i] / hmin[i])
        sigma[i] = low[i]
        active[i] = True


@kernel
def newton_step(squares: Any, slopes: Any, sigma: Any, low: Any, high: Any, active: Any, rtol: float) -> int:
    """One safeguarded Newton step on the reciprocal norm for every active block; how many stay active."""
    left = 0
    for i in range(sigma.size):
        if not active[i]:
            continue
        at = sigma[i]
        norm = math.sqrt(squares[i])
        if norm >= 1.0:
            low[i] = at
        if norm <= 1.0:
            high[i] = at
        following = at + (norm - 1.0) * squares[i] / slopes[i]
        if np.isfinite(following):
            following = min(max(following, low[i]), high[i])
        else:
            following = math.sqrt(low[i]) * math.sqrt(high[i])
        sigma[i] = following
        # From the left every step rises; one that does not has reached the rounding of the norm.
        active[i] = following > at * (1.0 + rtol) or not np.isfinite(norm)
        left += active[i]
    return left


# --- kernels on array memory ---------------------------------------------------------------------


@cache
def kernels(codec: Codec) -> SimpleNamespace:
    """The kernels that read or write one array, for its codec."""
    magnitude, clear, rescale_one = codec.magnitude, codec.clear, codec.scale
    keys32, keys64, keys_signed = (_key_kernel(key) for key in (codec.key32, codec.key64, codec.signed_key))

    @inner_any_order
    def run_sum(buffer: Any, at: int, step: int, count: int, square: bool) -> float:
        total = 0.0
        if square:
            for e in range(count):
                x = magnitude(buffer, at + e * step)
                total += x * x
        else:
            for e in range(count):
                total += magnitude(buffer, at + e * step)
        return total

    @inner
    def run_max(buffer: Any, at: int, step: int, count: int, top: float) -> float:
        for e in range(count):
            x = magnitude(buffer, at + e * step)
            if x > top or np.isnan(x):
                top = x
        return top

    @kernel
    def accumulate(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, e0: int, e1: int,
        code: int, chunk: int, hi: Any, lo: Any,
    ) -> None:  # fmt: skip
        """Add elements [e0, e1) of every block to its sum hi + lo, or their maximum to hi (code INF)."""
        run, step = elements[0, -1], elements[1, -1]
        for i in range(i0, i1):
            at = origin + place(i, grid)
            a, b = hi[i - i0], lo[i - i0]
            e = e0
            while e < e1:
                count = min(e1 - e, run - e % run, chunk)
                first = at + place(e, elements)
                if code == INF:
                    if not np.isnan(a):
                        a = run_max(buffer, first, step, count, a)
                else:
                    a, error = two_sum(a, run_sum(buffer, first, step, count, code == TWO))
                    b += error
                e += count
            hi[i - i0], lo[i - i0] = a, b

    @kernel
    def accumulate_scaled(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, e0: int, e1: int,
        top: Any, p: float, precise: bool, hi: Any, lo: Any,
    ) -> None:  # fmt: skip
        """Add (|x| / top) ** p of elements [e0, e1) of every block to its sum hi + lo.

        `precise` takes the powers in double-double: the root will multiply their error by 1 / p.
        """
        run, step = elements[0, -1], elements[1, -1]
        for i in range(i0, i1):
            largest = top[i - i0]
            if largest == 0.0 or not np.isfinite(largest):
                continue
            at = origin + place(i, grid)
            a, b = hi[i - i0], lo[i - i0]
            th, tl = dd_log(largest, 0.0) if precise else (0.0, 0.0)
            e = e0
            while e < e1:
                count = min(e1 - e, run - e % run)
                first = at + place(e, elements)
                for j in range(count):
                    x = magnitude(buffer, first + j * step)
                    if precise:
                        h, low = precise_power(x, th, tl, p)
                    else:
                        x /= largest
                        h, low = (x * x if p == 2.0 else x**p), 0.0
                    a, error = two_sum(a, h)
                    b += error + low
                e += count
            hi[i - i0], lo[i - i0] = a, b

    @kernel
    def accumulate_limbs(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, chosen: Any, count: int, total: int,
        square: bool, limbs: Any,
    ) -> None:  # fmt: skip
        """Add all elements of the `chosen` blocks (counted from i0) to their exact sums."""
        for row in range(count):
            at = origin + place(i0 + chosen[row], grid)
            for e in range(total):
                limbs_add(limbs, row, magnitude(buffer, at + place(e, elements)), square, 1)
                if e & 0x3FFFFFFF == 0x3FFFFFFF:  # before a limb can overflow
                    limbs_sign(limbs, row)

    @kernel
    def drop(buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, total: int, mask: Any) -> None:
        """Write +0.0 to every element of the blocks whose mask is False."""
        run, step = elements[0, -1], elements[1, -1]
        width, stride = grid[0, -1], grid[1, -1]
        i = i0
        while i < i1:
            stop = min(i1, i + width - i % width)
            at = origin + place(i, grid)
            if total == 1:
                for j in range(stop - i):
                    if not mask[i - i0 + j]:
                        clear(buffer, at + j * stride)
            else:
                for j in range(stop - i):
                    if not mask[i - i0 + j]:
                        for e in range(0, total, run):
                            first = at + j * stride + place(e, elements)
                            for r in range(run):
                                clear(buffer, first + r * step)
            i = stop

    @kernel
    def rescale(buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, total: int, factors: Any) -> None:
        """Multiply every element of a block by its factor; 0 writes +0.0, 1 touches nothing."""
        run, step = elements[0, -1], elements[1, -1]
        for i in range(i0, i1):
            factor = factors[i - i0]
            if factor == 1.0:
                continue
            at = origin + place(i, grid)
            for e in range(0, total, run):
                first = at + place(e, elements)
                for r in range(run):
                    if factor == 0.0:
                        clear(buffer, first + r * step)
                    else:
                        rescale_one(buffer, first + r * step, factor)

    @kernel
    def count_above(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, total: int, eps: float
    ) -> int:
        """How many elements of the blocks do not satisfy |x| <= eps."""
        found = 0
        for i in range(i0, i1):
            at = origin + place(i, grid)
            for e in range(total):
                found += not (magnitude(buffer, at + place(e, elements)) <= eps)
        return found

    return SimpleNamespace(
        keys32=keys32,
        keys64=keys64,
        keys_signed=keys_signed,
        accumulate=accumulate,
        accumulate_scaled=accumulate_scaled,
        accumulate_limbs=accumulate_limbs,
        drop=drop,
        rescale=rescale,
        count_above=count_above,
    )


def _key_kernel(key: Function) -> Function:
    """The kernel that reads 1-element blocks [i0, i1) as ordered integers."""

    @kernel
    def keys_of_elements(buffer: Any, origin: int, grid: Any, i0: int, i1: int, out: Any) -> None:
        width, stride = grid[0, -1], grid[1, -1]
        i = i0
        while i < i1:
            stop = min(i1, i + width - i % width)
            at = origin + place(i, grid)
            for j in range(stop - i):
                out[i - i0 + j] = key(buffer, at + j * stride)
            i = stop

    return keys_of_elements


@cache
def pair_kernels(data: Codec, metric: Codec) -> SimpleNamespace:
    """The kernels of the conditioned shrink, which read an array and its diagonal metric side by side."""
    magnitude, weight, rescale_one, clear = data.magnitude, metric.value, data.scale, data.clear

    @kernel
    def widest(
        x: Any, x_origin: int, x_grid: Any, x_elements: Any, h: Any, h_origin: int, h_grid: Any, h_elements: Any,
        i0: int, i1: int, total: int, unit: Any, largest: Any, hmin: Any, hmax: Any,
    ) -> None:  # fmt: skip
        """Per block: the largest h * unit * |v|, and the range of h."""
        for i in range(i0, i1):
            b = i - i0
            x_at, h_at = x_origin + place(i, x_grid), h_origin + place(i, h_grid)
            for e in range(total):
                hh = weight(h, h_at + place(e, h_elements))
                v = magnitude(x, x_at + place(e, x_elements))
                largest[b] = max(largest[b], hh * (v * unit[b]))
                hmin[b], hmax[b] = min(hmin[b], hh), max(hmax[b], hh)

    @kernel
    def weighted_squares(
        x: Any, x_origin: int, x_grid: Any, x_elements: Any, h: Any, h_origin: int, h_grid: Any, h_elements: Any,
        i0: int, i1: int, total: int, unit: Any, scale: Any, hi: Any, lo: Any,
    ) -> None:  # fmt: skip
        """Per block: the sum hi + lo of (scale * h * unit * |v|) ** 2, compensated element by element."""
        for i in range(i0, i1):
            b = i - i0
            x_at, h_at = x_origin + place(i, x_grid), h_origin + place(i, h_grid)
            for e in range(total):
                hh = weight(h, h_at + place(e, h_elements))
                w = hh * (magnitude(x, x_at + place(e, x_elements)) * unit[b]) * scale[b]
                hi[b], error = two_sum(hi[b], w * w)
                lo[b] += error

    @kernel
    def secular_sums(
        x: Any, x_origin: int, x_grid: Any, x_elements: Any, h: Any, h_origin: int, h_grid: Any, h_elements: Any,
        i0: int, i1: int, total: int, unit: Any, n: Any, hmax: Any, tau: Any, sigma: Any, active: Any,
        squares: Any, slopes: Any,
    ) -> None:  # fmt: skip
        """Per active block: sums of q ** 2 and q ** 2 * g / (g * sigma + tau), q = (hv / n) / (g * sigma + tau)."""
        for i in range(i0, i1):
            b = i - i0
            if not active[b]:
                continue
            x_at, h_at = x_origin + place(i, x_grid), h_origin + place(i, h_grid)
            for e in range(total):
                hh = weight(h, h_at + place(e, h_elements))
                w = hh * (magnitude(x, x_at + place(e, x_elements)) * unit[b]) / n[b]
                g = hh / hmax[b]
                q = w / (g * sigma[b] + tau[b])
                squares[b] += q * q
                slopes[b] += q * q * (g / (g * sigma[b] + tau[b]))

    @kernel
    def rescale_conditioned(
        x: Any, x_origin: int, x_grid: Any, x_elements: Any, h: Any, h_origin: int, h_grid: Any, h_elements: Any,
        i0: int, i1: int, total: int, hmax: Any, tau: Any, sigma: Any,
    ) -> None:  # fmt: skip
        """Multiply every element by g * sigma / (g * sigma + tau), g = h / hmax; tau = 0 touches nothing."""
        for i in range(i0, i1):
            b = i - i0
            if tau[b] == 0.0:
                continue
            x_at, h_at = x_origin + place(i, x_grid), h_origin + place(i, h_grid)
            for e in range(total):
                at = x_at + place(e, x_elements)
                if sigma[b] == 0.0:
                    clear(x, at)
                else:
                    gs = weight(h, h_at + place(e, h_elements)) / hmax[b] * sigma[b]
                    rescale_one(x, at, gs / (gs + tau[b]))

    return SimpleNamespace(
        widest=widest,
        weighted_squares=weighted_squares,
        secular_sums=secular_sums,
        rescale_conditioned=rescale_conditioned,
    )
