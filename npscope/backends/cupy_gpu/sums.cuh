// Sums beyond float64: double-double numbers, exact sums, and rounding from them.

#pragma once

#include "elements.cuh"

// An unevaluated sum of two float64, about 106 bits (Dekker 1971).
struct Pair {
    double hi, lo;
};

// The sum of two numbers and its rounding error (Knuth 1969).
__device__ inline Pair two_sum(double a, double b) {
    double s = a + b, t = s - a;
    return {s, (a - (s - t)) + (b - t)};
}

__device__ inline Pair two_product(double a, double b) {
    double p = a * b;
    return {p, fma(a, b, -p)};
}

__device__ inline void accumulate(Pair& sum, double term) {
    Pair next = two_sum(sum.hi, term);
    sum.hi = next.hi;
    sum.lo += next.lo;
}

__device__ inline void accumulate(Pair& sum, Pair term) {
    Pair next = two_sum(sum.hi, term.hi);
    sum.hi = next.hi;
    sum.lo += next.lo + term.lo;
}

__device__ inline Pair dd_add(Pair a, Pair b) {
    Pair s = two_sum(a.hi, b.hi);
    return two_sum(s.hi, s.lo + (a.lo + b.lo));
}

__device__ inline Pair dd_multiply(Pair a, Pair b) {
    Pair p = two_product(a.hi, b.hi);
    return two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}

__device__ inline Pair dd_divide(Pair a, double b) {
    double q = a.hi / b;
    Pair p = two_product(q, b);
    return two_sum(q, ((a.hi - p.hi) - p.lo + a.lo) / b);
}

#define LN2_HIGH 0.6931471805599453
#define LN2_LOW 2.3190468138462996e-17

// exp(a) = result * 2^exponent: halved nine times, a series, squared nine times.
__device__ inline Pair dd_exp(Pair a, int& exponent) {
    double k = rint(a.hi / LN2_HIGH);
    exponent = (int)k;
    Pair whole = dd_multiply({LN2_HIGH, LN2_LOW}, {k, 0.0});
    Pair r = dd_add(a, {-whole.hi, -whole.lo});
    r = {r.hi / 512.0, r.lo / 512.0};
    Pair s = dd_divide(r, 8.0);
    for (int n = 7; n > 0; n--) s = dd_divide(dd_multiply(dd_add({1.0, 0.0}, s), r), (double)n);
    for (int i = 0; i < 9; i++) s = dd_add({2.0 * s.hi, 2.0 * s.lo}, dd_multiply(s, s));
    return dd_add({1.0, 0.0}, s);
}

// The logarithm of a positive number: one Newton step from that of its high part.
__device__ inline Pair dd_log(Pair a) {
    int exponent, k;
    double fraction = frexp(a.hi, &exponent), low = ldexp(a.lo, -exponent), guess = log(fraction);
    Pair e = dd_exp({-guess, 0.0}, k);
    Pair r = dd_add(dd_multiply({fraction, low}, {ldexp(e.hi, k), ldexp(e.lo, k)}), {-1.0, 0.0});
    return dd_add(dd_add({guess, 0.0}, r), dd_multiply({LN2_HIGH, LN2_LOW}, {(double)exponent, 0.0}));
}

// --- correct rounding to float32 ----------------------------------------------------------------

#define DOUBT 2.2737367544323206e-13  // 2^-42: the relative error that a sum may have

// A sum good to DOUBT (of squares, if `square`) rounded to float32 bits; `sure` unless it may be the next larger one.
__device__ inline u32 rounded_sum(double sum, bool square, double& wide, bool& sure) {
    wide = square ? sqrt(sum) : sum;
    u32 below = narrowed(wide * (1 - DOUBT));
    sure = below == narrowed(wide * (1 + DOUBT));
    return below;
}

// Halfway from a float32 >= 0 to the next larger one, exactly; 2^128 stands for infinity.
__device__ inline double midpoint_above(u32 bits) {
    double above = bits + 1 == 0x7F800000 ? 3.402823669209384634e38 : widened(bits + 1);
    return (widened(bits) + above) / 2;
}

// An exact sum is an integer in 32-bit limbs, each in 64 bits, in units of 2^-352.
#define LIMBS 30
#define LIMB_ORIGIN 352

template <bool SHARED>
__device__ inline void limb_add(i64* limb, i64 value) {
    if (SHARED)
        atomicAdd((u64*)limb, (u64)value);
    else
        *limb += value;
}

// Adds sign * x, or x squared, exactly; x >= 0 with at most 25 significant bits.
template <bool SHARED>
__device__ inline void limbs_add(i64* limbs, double x, bool square, i64 sign) {
    if (x == 0.0) return;
    int exponent;
    i64 mantissa = (i64)(frexp(x, &exponent) * 33554432.0);  // 2^25
    exponent -= 25;
    if (square) {
        mantissa *= mantissa;
        exponent *= 2;
    }
    int zeros = __ffsll(mantissa) - 1;
    mantissa >>= zeros;
    exponent += zeros;
    for (int half = 0; half < 2; half++) {
        i64 bits = half ? mantissa >> 25 : mantissa & 0x1FFFFFF;
        if (bits == 0) continue;
        int position = exponent + LIMB_ORIGIN + 25 * half;
        u64 shifted = (u64)bits << (position & 31);
        limb_add<SHARED>(limbs + (position >> 5), sign * (i64)(shifted & 0xFFFFFFFF));
        limb_add<SHARED>(limbs + (position >> 5) + 1, sign * (i64)(shifted >> 32));
    }
}

// The sign of an exact sum; normalises its limbs, after which 2^30 more numbers may be added.
__device__ inline int limbs_sign(i64* limbs) {
    i64 carry = 0;
    bool nonzero = false;
    for (int j = 0; j < LIMBS; j++) {
        i64 total = limbs[j] + carry;
        carry = total >> 32;
        limbs[j] = total & 0xFFFFFFFF;
        nonzero = nonzero || limbs[j] != 0;
    }
    limbs[LIMBS - 1] += carry << 32;
    return carry < 0 ? -1 : nonzero;
}

// `below` or the float32 above it: the one nearer to an exact sum, less the midpoint (squared), with this sign.
__device__ inline u32 settled(u32 below, int side) { return side > 0 || (side == 0 && (below & 1)) ? below + 1 : below; }

// What the proximal step multiplies a block by; NaN for a threshold that is none.
__device__ inline double shrink_factor(double norm, double wide, double t) {
    if (!(t >= 0.0)) return not_a_number();
    if (norm != norm || t == 0.0 || (isinf(norm) && !isinf(t))) return 1.0;
    return norm <= t ? 0.0 : (wide - t) / wide;
}

// The float32 nearest to the root of a double-double.
__device__ inline double rounded_root(Pair sum) {
    double root = sqrt(sum.hi);
    if (!isfinite(root) || root > 3.5e38 || root == 0.0) return widened(narrowed(root));
    u32 below = narrowed(root * (1 - DOUBT));
    double middle = midpoint_above(below);
    Pair square = two_product(middle, middle);
    double side = ((sum.hi - square.hi) - square.lo) + sum.lo;
    return widened(settled(below, side > 0 ? 1 : side < 0 ? -1 : 0));
}
