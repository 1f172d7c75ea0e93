// The proximal step in a diagonal metric: every block solved for its mu, then written as h / (h + mu) times itself.
//
// With w = H v / ||H v||, g = h / max h and tau = t / ||H v||, sigma solves ||w / (g sigma + tau)|| = 1, by Newton's
// method on the reciprocal norm, which rises monotonically from (1 - tau) / max g; where the norm overflows the
// bracket is halved. Owners as in owners.cuh.

#include "owners.cuh"

#define SAFE_TOP 2.9073548971824276e135    // 2^450: up to here numbers may be squared and summed
#define SAFE_UNIT 4.149515568880993e180    // 2^600: brings any other there
#define LEAST_METRIC 1e-150
#define LARGEST_METRIC 1e150
#define INFINITE __longlong_as_double(0x7FF0000000000000LL)

enum Failure { BAD_METRIC = 1, NOT_CONVERGED = 2 };

__device__ inline double safe_unit(double top) {
    if (top > SAFE_TOP) return 1.0 / SAFE_UNIT;
    return top > 0.0 && top < 1.0 / SAFE_TOP ? SAFE_UNIT : 1.0;
}

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
    double unit = infinite ? 1.0 : safe_unit(top), widest = 0.0;
    Pair size = {0.0, 0.0}, sum = {0.0, 0.0};
    if (!infinite) {
        each(block, metrics, lane, [&](double v, double h) {
            v *= unit;
            widest = larger(widest, h * v);
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
        double w = h * (v * unit) * scale;
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
            double g = h / most, inverse = 1.0 / (g * sigma + tau), q = h * (v * unit) / norm * inverse;
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
        bool open = next > sigma * (1.0 + limits.rtol) || !isfinite(length);
        sigma = next;
        if (!open) return tau / sigma * most;
    }
    failure = NOT_CONVERGED;
    return not_a_number();
}

// mu of every block, in row-major order of (scope, block).
extern "C" __global__ void solve(
    Leaves leaves, Leaves metrics, const __grid_constant__ Numbers thresholds, Limits limits, i64 scopes, i64 blocks, i64 start, double* mus, int* failures
) {
    int lane = threadIdx.x % LANES;
    for (i64 i = (i64)blockIdx.x * OWNERS + threadIdx.x / LANES; i < scopes * blocks; i += (i64)gridDim.x * OWNERS) {
        Block block = {leaves, 0, 0};
        split(i, blocks, scopes, block.s, block.j);
        int failure = 0;
        double t = in_norm_dtype(number_at(thresholds, block.s, start + block.j), limits.narrow);
        double mu = solved(block, metrics, lane, t, limits, failure);
        if (lane == 0) {
            mus[i] = mu;
            if (failure) atomicOr(failures, failure);
        }
        owner_sync();
    }
}

// Every element of a leaf times h / (h + mu).
extern "C" __global__ void weigh(const double* mus, Leaf leaf, Leaf metric, i64 scopes, i64 blocks) {
    i64 elements = leaf.elements, count = scopes * blocks * elements;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        i64 b, e, s, j;
        split(i, elements, 2, b, e);
        split(b, blocks, scopes, s, j);
        double h = real_at(metric.data + scope_offset(metric, s) + block_offset(metric, j) + element_offset(metric, e), metric.dtype);
        char* at = leaf.data + scope_offset(leaf, s) + block_offset(leaf, j) + element_offset(leaf, e);
        scale_at(at, dtype_of(leaf), h / (h + mus[b]));
    }
}
