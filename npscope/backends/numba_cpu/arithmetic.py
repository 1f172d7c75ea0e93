"""Sums and powers beyond float64: double-double numbers, and rounding from them.

A double-double is an unevaluated sum of two float64, about 106 bits (Dekker 1971). Functions
here are only called from other compiled functions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npscope.backends.numba_cpu.codecs import Real
from npscope.backends.numba_cpu.jit import inner


@inner
def two_sum(a: float, b: float) -> tuple[float, float]:
    """(s, e) with s the rounded sum and s + e exact (Knuth 1969)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


# --- double-double powers ------------------------------------------------------------------------

_LN2_HI, _LN2_LO = 0.6931471805599453, 2.3190468138462996e-17
_SPLIT = 134217729.0  # 2**27 + 1

Pair = tuple[Any, Any]
"""A double-double: (high part, low part)."""


@inner
def two_product(a: Real, b: Real) -> Pair:
    """The product of two float64, exactly (Dekker's splitting; no overflow guard)."""
    p = a * b
    c = _SPLIT * a
    a1 = c - (c - a)
    c = _SPLIT * b
    b1 = c - (c - b)
    a2, b2 = a - a1, b - b1
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


@inner
def dd_add(ah: Real, al: Real, bh: Real, bl: Real) -> Pair:
    """Sum of two double-doubles."""
    s, e = two_sum(ah, bh)
    return two_sum(s, e + (al + bl))


@inner
def dd_multiply(ah: Real, al: Real, bh: Real, bl: Real) -> Pair:
    """Product of two double-doubles."""
    p, e = two_product(ah, bh)
    return two_sum(p, e + (ah * bl + al * bh))


@inner
def dd_divide(ah: Real, al: Real, b: Real) -> Pair:
    """A double-double over a float64."""
    q = ah / b
    p, e = two_product(q, b)
    return two_sum(q, ((ah - p) - e + al) / b)


@inner
def dd_exp(ah: Real, al: Real) -> tuple[Any, Any, int]:
    """(h, l, k) with ``exp(a) = (h + l) * 2**k``; a finite."""
    k = np.rint(ah / _LN2_HI)
    ph, pl = dd_multiply(_LN2_HI, _LN2_LO, k, 0.0)
    rh, rl = dd_add(ah, al, -ph, -pl)
    rh, rl = rh / 512.0, rl / 512.0
    # exp(r) - 1 by its series, |r| < 0.0007; then nine times exp(2r) - 1 = s (s + 2).
    sh, sl = dd_divide(rh, rl, 8.0)
    for n in range(7, 0, -1):
        th, tl = dd_add(1.0, 0.0, sh, sl)
        th, tl = dd_multiply(th, tl, rh, rl)
        sh, sl = dd_divide(th, tl, float(n))
    for _ in range(9):
        th, tl = dd_multiply(sh, sl, sh, sl)
        sh, sl = dd_add(2.0 * sh, 2.0 * sl, th, tl)
    sh, sl = dd_add(1.0, 0.0, sh, sl)
    return sh, sl, int(k)


@inner
def dd_log(ah: Real, al: Real) -> Pair:
    """Logarithm of a positive double-double: one Newton step from that of its high part."""
    fraction, exponent = math.frexp(ah)
    low = math.ldexp(al, -exponent)
    guess = math.log(fraction)
    eh, el, k = dd_exp(-guess, 0.0)
    ph, pl = dd_multiply(fraction, low, math.ldexp(eh, k), math.ldexp(el, k))
    rh, rl = dd_add(ph, pl, -1.0, 0.0)
    lh, ll = dd_add(guess, 0.0, rh, rl)
    th, tl = dd_multiply(_LN2_HI, _LN2_LO, float(exponent), 0.0)
    return dd_add(lh, ll, th, tl)
