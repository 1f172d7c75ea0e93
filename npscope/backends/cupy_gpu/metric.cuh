// The proximal step in a diagonal metric: a block is solved for its mu, then it is h / (h + mu) times itself.
//
// With w = H v / ||H v||, g = h / max h and tau = t / ||H v||, sigma solves ||w / (g sigma + tau)|| = 1, by Newton's
// method on the reciprocal norm, which rises monotonically from (1 - tau) / max g; where it overflows the bracket is
// halved, maybe beyond the root, so that the next step falls. Owners as in owners.cuh.

#pragma once

#include "owners.cuh"

#define SAFE_TOP 2.9073548971824276e135    // 2^450: up to here numbers may be squared and summed
#define SAFE_UNIT 4.149515568880993e180    // 2^600: brings any other there
#define SHORT (1.0 - 0x1p-40)              // norms below this are not 1 but for rounding
#define INFINITE __longlong_as_double(0x7FF0000000000000LL)

enum Failure { BAD_METRIC = 1, NOT_CONVERGED = 2 };

__device__ inline double safe_unit(double top) {
    if (top > SAFE_TOP) return 1.0 / SAFE_UNIT;
    return top > 0.0 && top < 1.0 / SAFE_TOP ? SAFE_UNIT : 1.0;
}

// h v times a unit, by the root of it: each factor takes one. Small elements may weigh most: beside large ones, v times
// the unit would be subnormal, and h v may overflow.
__device__ inline double weighed(double v, double h, double root) { return (h * root) * (v * root); }

// Calls use(|v|, h) for every element of a block that a lane has.
template <class Use>
__device__ inline void each(const Block& block, const Leaves& metrics, int lane, Use use) {
    for (int l = 0; l < block.leaves.count; l++) {
        const Leaf &leaf = block.leaves[l], &metric = metrics[l];
        const char *base = block.base(leaf), *weights = Block{metrics, block.s, block.j}.base(metric);
        for (i64 e = lane; e < leaf.elements; e += LANES)
            use(
                magnitude_at(base + element_offset(leaf, e), dtype_of(leaf)),
                real_at(weights + element_offset(metric, e), metric.dtype)
            );
    }
}

__device__ inline double sum_of(double x) { return total_of({x, 0.0}).hi; }

struct Limits {
    int exact, narrow;
    int steps;
    double rtol;
};

// mu of a block: 0 leaves it as it is, infinity makes it zero, NaN spoils it.
__device__ inline double solved(const Block& block, const Leaves& metrics, int lane, double t, const Limits& limits, int& failure) {
    double top = 0.0, least = INFINITE, most = 0.0;
    each(block, metrics, lane, [&](double v, double h) {
        top = larger(top, v);
        most = larger(most, h);
        least = h < least ? h : least;
    });
    top = largest_of(top);
    most = largest_of(most);
    least = -largest_of(-least);
    if (!(least >= LEAST_METRIC && most <= LARGEST_METRIC)) failure = BAD_METRIC;
    if (failure || !(t >= 0.0)) return not_a_number();
    if (top != top || t == 0.0) return 0.0;
    bool infinite = isinf(top);
    double unit = infinite ? 1.0 : safe_unit(top), root = sqrt(unit), widest = 0.0;
    Pair size = {0.0, 0.0}, sum = {0.0, 0.0};
    if (!infinite) {
        each(block, metrics, lane, [&](double v, double h) {
            widest = larger(widest, weighed(v, h, root));
            v *= unit;
            accumulate(size, v * v);
        });
        widest = largest_of(widest);
        size = total_of(size);
        double norm = sqrt(size.hi + size.lo) / unit;
        infinite = isinf(in_norm_dtype(limits.exact && unit == 1.0 ? rounded_root(size) : norm, limits.narrow));
    }
    if (infinite) return isinf(t) ? INFINITE : 0.0;
    double scale = safe_unit(widest), limit = t * unit;
    each(block, metrics, lane, [&](double v, double h) {
        double w = weighed(v, h, root) * scale;
        accumulate(sum, w * w);
    });
    sum = total_of(sum);
    double norm = sqrt(sum.hi + sum.lo) / scale;
    double rounded = limits.exact && scale == 1.0 ? rounded_root(two_sum(sum.hi, sum.lo)) : norm;
    if (in_norm_dtype(rounded, limits.narrow) <= in_norm_dtype(limit, limits.narrow)) return INFINITE;

    double tau = limit / norm, sigma = (norm - limit) / norm, low = sigma, high = sigma / (least / most);
    for (int step = 0; step < limits.steps; step++) {
        double squares = 0.0, slope = 0.0;
        each(block, metrics, lane, [&](double v, double h) {
            double g = h / most, inverse = 1.0 / (g * sigma + tau), q = weighed(v, h, root) / norm * inverse;
            squares += q * q;
            slope += q * q * (g * inverse);
        });
        squares = sum_of(squares);
        slope = sum_of(slope);
        double length = sqrt(squares);
        if (length >= 1.0) low = sigma;
        if (length <= 1.0) high = sigma;
        double newton = sigma + (length - 1.0) * squares / slope, next;
        if (isfinite(newton))
            next = fmin(fmax(newton, low), high);
        else
            next = sqrt(low) * sqrt(high);
        bool falls = next < sigma * (1.0 - limits.rtol) && length < SHORT;
        bool open = next > sigma * (1.0 + limits.rtol) || falls || !isfinite(length);
        sigma = next;
        if (!open) return tau / sigma * most;
    }
    failure = NOT_CONVERGED;
    return not_a_number();
}
