// Norms of blocks of any layout; owners as in owners.cuh.
//
// Sums are double-double in a fixed order, good to 2^-42 for 2^30 terms. Norms below float64 are the
// correctly rounded exact ones: the owner sums a block again, in integers, where that error straddles
// the midpoint of two floats.

#pragma once

#include "owners.cuh"

#define SEGMENT (1 << 29)   // numbers that limbs can take between normalisations

enum Order { ONE, TWO, LARGEST, POWER };

enum Output { NORM, FACTOR };

struct Measure {
    int order;
    int exact;   // correctly rounded
    int narrow;  // the norm is a float32
    int output;  // norms, or what the proximal step multiplies a block by
    int wide_output;
    double p;
};

struct Partial {
    double hi, lo, top;
};

// Adds elements [from, to) of the leaves of a block, side by side, in steps: powers of |x| to `sum`, or the maximum.
__device__ inline void add_elements(
    const Block& block, i64 from, i64 to, int first, int step, int order, Pair& sum, double& top
) {
    for (int l = 0; l < block.leaves.count && from < to; l++) {
        const Leaf& leaf = block.leaves[l];
        const char* base = block.base(leaf);
        int dtype = dtype_of(leaf);
        i64 stop = to < leaf.elements ? to : leaf.elements;
        for (i64 e = from + first; e < stop; e += step) {
            double x = magnitude_at(base + element_offset(leaf, e), dtype);
            if (order == LARGEST)
                top = larger(top, x);
            else
                accumulate(sum, order == TWO ? x * x : x);
        }
        from = from > leaf.elements ? from - leaf.elements : 0;
        to -= leaf.elements;
    }
}

// (x / top)^p, in double-double where the root will multiply its error.
__device__ inline Pair power_of(double x, double top, Pair log_top, double p, bool precise) {
    if (x == 0.0) return {0.0, 0.0};
    if (precise) {
        int k;
        Pair power = dd_exp(dd_multiply(dd_add(dd_log({x, 0.0}), {-log_top.hi, -log_top.lo}), {p, 0.0}), k);
        return {ldexp(power.hi, k), ldexp(power.lo, k)};
    }
    x /= top;
    return {p == 2.0 ? x * x : pow(x, p), 0.0};
}

// The norm in float64 by powers of |x| / max |x|, which neither over- nor underflow.
__device__ __noinline__ double scaled_norm(const Block& block, int lane, i64 elements, double p, bool precise) {
    Pair sum = {0.0, 0.0};
    double top = 0.0;
    add_elements(block, 0, elements, lane, LANES, LARGEST, sum, top);
    top = largest_of(top);
    if (top == 0.0 || !isfinite(top)) return top;
    Pair log_top = precise ? dd_log({top, 0.0}) : Pair{0.0, 0.0};
    for (int l = 0; l < block.leaves.count; l++) {
        const Leaf& leaf = block.leaves[l];
        const char* base = block.base(leaf);
        for (i64 e = lane; e < leaf.elements; e += LANES) {
            double x = magnitude_at(base + element_offset(leaf, e), dtype_of(leaf));
            accumulate(sum, power_of(x, top, log_top, p, precise));
        }
    }
    sum = total_of(sum);
    if (!precise) {
        double total = sum.hi + sum.lo;
        return top * (p == 2.0 ? sqrt(total) : pow(total, 1.0 / p));
    }
    sum = two_sum(sum.hi, sum.lo);
    if (sum.hi == 1.0 && sum.lo == 0.0) return top;
    Pair root = dd_add(dd_divide(dd_log(sum), p), log_top);
    if (!(root.hi < 710.0)) return not_a_number() == root.hi ? top : __longlong_as_double(0x7FF0000000000000LL);
    int k;
    Pair norm = dd_exp(root, k);
    return ldexp(norm.hi + norm.lo, k);
}

// `below` or the next float32, whichever is nearer to the exact norm.
__device__ inline u32 settled_block(const Block& block, int lane, bool square, u32 below, i64* limbs) {
    constexpr bool shared = LANES > 1;
    for (int i = lane; i < LIMBS; i += LANES) limbs[i] = 0;
    owner_sync();
    if (lane == 0) limbs_add<shared>(limbs, midpoint_above(below), square, -1);
    for (int l = 0; l < block.leaves.count; l++) {
        const Leaf& leaf = block.leaves[l];
        const char* base = block.base(leaf);
        for (i64 from = 0; from < leaf.elements; from += SEGMENT) {
            i64 stop = from + SEGMENT < leaf.elements ? from + SEGMENT : leaf.elements;
            for (i64 e = from + lane; e < stop; e += LANES)
                limbs_add<shared>(limbs, magnitude_at(base + element_offset(leaf, e), dtype_of(leaf)), square, 1);
            owner_sync();
            if (lane == 0) limbs_sign(limbs);
            owner_sync();
        }
    }
    // Every lane must find the same sign, so that none may normalise what another reads.
    bool negative = limbs[LIMBS - 1] < 0, nonzero = false;
    for (int i = 0; i < LIMBS; i++) nonzero = nonzero || limbs[i] != 0;
    owner_sync();
    return settled(below, negative ? -1 : nonzero);
}

struct Size {
    double norm, wide;  // in the norm's dtype; in float64
};

// The norm of a block from its elements, or from sums of `chunks` pieces of it; the same in every lane.
__device__ inline Size size_of(
    const Block& block, const Measure& measure, int lane, i64 elements, const Partial* partials, i64 chunks, i64* limbs
) {
    bool square = measure.order == TWO;
    Pair sum = {0.0, 0.0};
    double top = 0.0, wide, norm;
    if (measure.order == POWER) {
        wide = scaled_norm(block, lane, elements, measure.p, !measure.narrow);
    } else {
        if (chunks) {
            for (i64 c = lane; c < chunks; c += LANES) {
                Partial part = partials[c];
                accumulate(sum, {part.hi, part.lo});
                top = larger(top, part.top);
            }
        } else {
            add_elements(block, 0, elements, lane, LANES, measure.order, sum, top);
        }
        if (measure.order == LARGEST) {
            wide = largest_of(top);
        } else {
            sum = total_of(sum);
            wide = isfinite(sum.hi) ? sum.hi + sum.lo : sum.hi;
            if (square) wide = sqrt(wide);
        }
    }
    norm = in_norm_dtype(wide, measure.narrow);
    if (measure.order < LARGEST && isfinite(sum.hi) && measure.exact) {
        bool sure;
        u32 below = rounded_sum(sum.hi + sum.lo, square, wide, sure);
        norm = widened(sure ? below : settled_block(block, lane, square, below, limbs));
    } else if (square && sum.hi == sum.hi && !measure.exact && !(sum.hi > 1e-280 && isfinite(sum.hi))) {
        wide = scaled_norm(block, lane, elements, 2.0, false);
        norm = in_norm_dtype(wide, measure.narrow);
    }
    return {norm, wide};
}
