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
#define ROUGH 1e-5f
#define LEAST_METRIC 1e-150
#define BEYOND 1.1579208231755e77  // squares of norms from about here on round to infinity in float32
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

__device__ inline double most_of_team(double x) {
#pragma unroll
    for (int d = TEAM / 2; d; d >>= 1) {
        double other = __shfl_xor_sync(FULL, x, d);
        x = other > x || other != other ? other : x;
    }
    return x;
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

        double plain = 0.0, sum = 0.0, least = INFINITE, most = 0.0;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            double v = widened(x[k / VECTOR].parts[k % VECTOR]), c = widened(h[k / VECTOR].parts[k % VECTOR]), w = c * v;
            plain = fma(v, v, plain);
            sum += w * w;
            most = c > most || c != c ? c : most;
            least = c < least ? c : least;
        }
        plain = over_team(plain);
        sum = over_team(sum);
        most = most_of_team(most);
        least = -most_of_team(-least);
        double norm, wide;
        bool sure, infinite = plain >= BEYOND;
        norm = widened(rounded_sum(sum, true, wide, sure));
        if (__any_sync(FULL, !sure || fabs(plain / BEYOND - 1.0) < 1e-6)) {
            Pair sizes = {0.0, 0.0}, exact = {0.0, 0.0};
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                double v = widened(x[k / VECTOR].parts[k % VECTOR]), w = widened(h[k / VECTOR].parts[k % VECTOR]) * v;
                accumulate(sizes, v * v);
                accumulate(exact, w * w);
            }
            sizes = over_team(sizes);
            exact = over_team(exact);
            infinite = isinf(rounded_root(two_sum(sizes.hi, sizes.lo)));
            norm = isfinite(exact.hi) ? rounded_root(two_sum(exact.hi, exact.lo)) : exact.hi;
        }

        // mu: 0 leaves a tile as it is, infinity makes it zero, NaN spoils it.
        double mu = not_a_number();
        bool open = false;
        if (!(least >= LEAST_METRIC && isfinite(most)) || !(t >= 0.0)) {
            ;
        } else if (plain != plain || t == 0.0) {
            mu = 0.0;
        } else if (infinite) {
            mu = isinf(t) ? INFINITE : 0.0;
        } else if (norm <= t) {
            mu = INFINITE;
        } else {
            open = true;
        }

        double low = (wide - t) / most, high = (wide - t) / least, s = low;
        if (steps > 4) {
            float rough = 0.0f, tau = (float)(t / wide), start = (float)((wide - t) / wide);
            float g[HELD], w[HELD];
            double to_w = 1.0 / wide, to_g = 1.0 / most;
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                double c = widened(h[k / VECTOR].parts[k % VECTOR]);
                g[k] = (float)(c * to_g);
                w[k] = (float)(c * widened(x[k / VECTOR].parts[k % VECTOR]) * to_w);
            }
            rough = start;
            bool moves = open;
            for (int step = 0; step < ROUGH_STEPS && __any_sync(FULL, moves); step++) {
                float squares = 0.0f, slope = 0.0f;
#pragma unroll
                for (int k = 0; k < HELD; k++) {
                    float inverse = __fdividef(1.0f, fmaf(g[k], rough, tau)), q = w[k] * inverse;
                    q *= q;
                    squares += q;
                    slope = fmaf(q, g[k] * inverse, slope);
                }
                squares = over_team(squares);
                slope = over_team(slope);
                float next = rough + (sqrtf(squares) - 1.0f) * squares / slope;
                moves = moves && next > rough * (1.0f + ROUGH);
                if (next > rough && next < 3e38f) rough = next;
            }
            s = fmin(fmax((double)rough * (wide / most), low), high);
        }
        bool seeks = open;
        for (int step = 0; step < steps && __any_sync(FULL, seeks); step++) {
            double squares = 0.0, slope = 0.0;
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                double c = widened(h[k / VECTOR].parts[k % VECTOR]);
                double inverse = 1.0 / fma(c, s, t), q = c * widened(x[k / VECTOR].parts[k % VECTOR]) * inverse;
                q *= q;
                squares += q;
                slope = fma(q, c * inverse, slope);
            }
            squares = over_team(squares);
            slope = over_team(slope);
            if (!seeks) continue;
            double length = sqrt(squares);
            if (length >= 1.0) low = s;
            if (length <= 1.0) high = s;
            double newton = s + (length - 1.0) * squares / slope, next = sqrt(low) * sqrt(high);
            if (isfinite(newton)) next = fmin(fmax(newton, low), high);
            // A step down can only come from a start above the root, and ends quadratically near it.
            seeks = next > s * (1.0 + rtol) || next < s * (1.0 - 1e-6) || !isfinite(length);
            s = next;
        }
        if (open && !seeks) mu = t / s;
        if (!there || (mu == 0.0 && from == to)) continue;
        Stored* into = (Stored*)tile_at(to, written, tile);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int u = 0; u < VECTOR; u++) {
                double c = widened(h[r].parts[u]);
                scale_at((char*)(x[r].parts + u), ELEMENT, c / (c + mu));
            }
            *(RawVector*)(into + r * written.pitch + member * VECTOR) = x[r].raw;
        }
    }
}
