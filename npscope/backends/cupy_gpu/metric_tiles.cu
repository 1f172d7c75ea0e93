// The proximal step in a diagonal metric, for float32 tiles of ROWS runs that a team of lanes holds in its registers.
//
// As in shrinkage.cu, with s = sigma * ||H v|| / max h: ||H v / (h s + t)|| = 1. The first steps are taken in
// float32, the last in float64 from there. Squares of float32 products neither over- nor underflow in float64.

#include "tiles.cuh"

#ifndef ROWS
#define ROWS 1
#endif
#define HELD (ROWS * VECTOR)
#define ROUGH_STEPS 8
#define ROUGH 3e-4f
#define SMALL 1e-5                  // steps from here on are known to be the last
#define NEARLY_INFINITE 0x7A000000  // 2^117: smaller ones have a finite norm, 1024 of them too
#define INFINITE __longlong_as_double(0x7FF0000000000000LL)

__device__ inline double over_team(double x) {
#pragma unroll
    for (int d = TEAM / 2; d; d >>= 1) x += __shfl_xor_sync(FULL, x, d);
    return x;
}

__device__ inline float over_team(float x) {
#pragma unroll
    for (int d = TEAM / 2; d; d >>= 1) x += __shfl_xor_sync(FULL, x, d);
    return x;
}

__device__ inline Pair over_team(Pair sum) {
#pragma unroll
    for (int d = TEAM / 2; d; d >>= 1) {
        Pair other = {__shfl_xor_sync(FULL, sum.hi, d), __shfl_xor_sync(FULL, sum.lo, d)};
        Pair joined = two_sum(sum.hi, other.hi);
        sum = {joined.hi, joined.lo + (sum.lo + other.lo)};
    }
    return sum;
}

__device__ inline u32 most_of_team(u32 x) {
#pragma unroll
    for (int d = TEAM / 2; d; d >>= 1) x = max(x, __shfl_xor_sync(FULL, x, d));
    return x;
}

__device__ inline float quick_inverse(float x) {
#ifdef NPSCOPE_EMULATED
    return 1.0f / x;
#else
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
#endif
}

// 1 / sqrt(x)
__device__ inline float quick_root(float x) {
#ifdef NPSCOPE_EMULATED
    return 1.0f / sqrtf(x);
#else
    float root;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#endif
}

// 1 / x to 2^-50 for positive x, from the 20 bits that the hardware gives. A division would take three times as long.
__device__ inline double inverse_of(double x) {
#ifdef NPSCOPE_EMULATED
    return 1.0 / x;
#else
    double r;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
    double e = fma(-x, r, 1.0);
    return fma(r, fma(e, e, e), r);
#endif
}

extern "C" __global__ void shrink_in_metric(
    const Stored* from, Matrix m, const Stored* metric, Matrix weights, const __grid_constant__ Numbers thresholds, int steps, double rtol,
    i64 blocks, i64 scopes, Stored* to, Matrix written
) {
    int member = threadIdx.x % TEAM;
    i64 teams = (i64)gridDim.x * blockDim.x / TEAM, first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / TEAM;
    i64 rounds = (m.tiles + teams - 1) / teams;
    for (i64 round = 0; round < rounds; round++) {
        i64 tile = round * teams + first, scope = 0, j = 0;
        bool there = tile < m.tiles;
        if (!there) tile = 0;
        Vector x[ROWS], h[ROWS];
        const Stored *at = tile_at(from, m, tile), *beside = tile_at(metric, weights, tile);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            x[r].raw = *(const RawVector*)(at + r * m.pitch + member * VECTOR);
            h[r].raw = *(const RawVector*)(beside + r * weights.pitch + member * VECTOR);
        }
        if (!thresholds.constant) split(tile, blocks, scopes, scope, j);
        double t = in_norm_dtype(number_at(thresholds, scope, j), true);

        // Positive numbers order as their bits do; what is no number, or negative, is beyond all of them.
        double sum = 0.0;
        u32 least_bits = 0xFFFFFFFF, most_bits = 0, size = 0;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            u32 v = x[k / VECTOR].parts[k % VECTOR], c = h[k / VECTOR].parts[k % VECTOR];
            double w = widened(c) * widened(v);
            sum = fma(w, w, sum);
            most_bits = max(most_bits, c);
            least_bits = min(least_bits, c);
            size = max(size, v & 0x7FFFFFFF);
        }
        sum = over_team(sum);
        most_bits = most_of_team(most_bits);
        least_bits = ~most_of_team(~least_bits);
        size = most_of_team(size);
        double norm, wide, least = widened(least_bits), most = widened(most_bits);
        bool sure, infinite = size == 0x7F800000, valid = least_bits > 0 && most_bits < 0x7F800000;
        norm = widened(rounded_sum(sum, true, wide, sure));
        if (__any_sync(FULL, !sure || size >= NEARLY_INFINITE)) {
            Pair sizes = {0.0, 0.0}, exact = {0.0, 0.0};
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                double v = widened(x[k / VECTOR].parts[k % VECTOR]), w = widened(h[k / VECTOR].parts[k % VECTOR]) * v;
                accumulate(sizes, v * v);
                accumulate(exact, w * w);
            }
            sizes = over_team(sizes);
            exact = over_team(exact);
            infinite = infinite || isinf(rounded_root(two_sum(sizes.hi, sizes.lo)));
            norm = isfinite(exact.hi) ? rounded_root(two_sum(exact.hi, exact.lo)) : exact.hi;
        }

        // mu: 0 leaves a tile as it is, infinity makes it zero, NaN spoils it.
        double mu = not_a_number();
        bool open = false;
        if (!valid || !(t >= 0.0)) {
            ;
        } else if (size > 0x7F800000 || t == 0.0) {
            mu = 0.0;
        } else if (infinite) {
            mu = isinf(t) ? INFINITE : 0.0;
        } else if (norm <= t) {
            mu = INFINITE;
        } else {
            open = true;
        }

        // The ends of the bracket may be a little wide; s = 0 is never reached.
        double low = (wide - t) * inverse_of(most) * (1 - 1e-12), high = (wide - t) * inverse_of(least) * (1 + 1e-12), s = low;
        if (steps > 4) {
            // In float32, from where the tangent at 0 meets 1: the reciprocal norm is concave, so that is below the root.
            double per_norm = inverse_of(wide);
            float tau = (float)(t * per_norm), start = (float)((wide - t) * per_norm), to_g = quick_inverse(__uint_as_float(most_bits));
            float g[HELD], w[HELD], mean = 0.0f, to_w = (float)(most * per_norm);
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                g[k] = __uint_as_float(h[k / VECTOR].parts[k % VECTOR]) * to_g;
                w[k] = g[k] * (__uint_as_float(x[k / VECTOR].parts[k % VECTOR]) * to_w);
                mean = fmaf(w[k] * w[k], g[k], mean);
            }
            mean = over_team(mean);
            float rough = start;
            if (mean > 0.0f && mean < 1.0f) rough = start * quick_inverse(mean);
            bool moves = open;
            for (int step = 0; step < ROUGH_STEPS && __any_sync(FULL, moves); step++) {
                float squares = 0.0f, slope = 0.0f;
#pragma unroll
                for (int k = 0; k < HELD; k++) {
                    float inverse = quick_inverse(fmaf(g[k], rough, tau)), q = w[k] * inverse;
                    q *= q;
                    squares += q;
                    slope = fmaf(q, g[k] * inverse, slope);
                }
                squares = over_team(squares);
                slope = over_team(slope);
                float next = rough + (squares * quick_root(squares) - 1.0f) * squares * quick_inverse(slope);
                moves = moves && next > rough * (1.0f + ROUGH);
                if (next > rough && next < 3e38f) rough = next;
            }
            s = fmin(fmax((double)rough * wide * inverse_of(most), low), high);
        }
        bool seeks = open;
        for (int step = 0; step < steps && __any_sync(FULL, seeks); step++) {
            double squares = 0.0, slope = 0.0;
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                double c = widened(h[k / VECTOR].parts[k % VECTOR]);
                double inverse = inverse_of(fma(c, s, t)) * c, q = widened(x[k / VECTOR].parts[k % VECTOR]) * inverse;
                q *= q;
                squares += q;
                slope = fma(q, inverse, slope);
            }
            squares = over_team(squares);
            slope = over_team(slope);
            if (!seeks) continue;
            double length = sqrt(squares);
            if (length >= 1.0) low = s;
            if (length <= 1.0) high = s;
            double next = s + (length - 1.0) * squares * inverse_of(slope);
            next = isfinite(next) ? fmin(fmax(next, low), high) : sqrt(low) * sqrt(high);
            // A step leaves an error of about its square; steps down only come from a start just above the root.
            double change = next - s;
            seeks = !(change * change <= rtol * s * s && fabs(change) < SMALL * s) || !isfinite(length);
            s = next;
        }
        if (open && !seeks) mu = t * inverse_of(s);
        if (!there || (mu == 0.0 && from == to)) continue;
        Stored* into = (Stored*)tile_at(to, written, tile);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int u = 0; u < VECTOR; u++) {
                double c = widened(h[r].parts[u]);
                double factor = isinf(mu) ? 0.0 : c * inverse_of(c + mu);
                scale_at((char*)(x[r].parts + u), ELEMENT, mu == 0.0 ? 1.0 : factor);
            }
            *(RawVector*)(into + r * written.pitch + member * VECTOR) = x[r].raw;
        }
    }
}
