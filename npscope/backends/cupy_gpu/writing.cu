// Decisions written: masks, k-th values, dropped, scaled and softened blocks of any layout.
//
// A thread owns one element at a time; grids stride, so any grid is right.

#include "decisions.cuh"

#define EACH(i, count) \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += (i64)gridDim.x * blockDim.x)

// Columns [start, start + blocks) of a mask with `row` columns.
extern "C" __global__ void write_mask(const __grid_constant__ Decision decision, i64 scopes, i64 blocks, i64 row, u8* mask) {
    EACH(i, scopes * blocks) {
        i64 s, j;
        split(i, blocks, scopes, s, j);
        mask[s * row + decision.start + j] = decide(decision, s, j) != DROP;
    }
}

// The k-th largest values: the numbers whose keys are the cuts.
extern "C" __global__ void write_kth(const Cutoff* cutoffs, int kind, i64 scopes, int dtype, char* out) {
    EACH(s, scopes) write_key(out + s * width_of(dtype), dtype, (Key)cutoffs[s].key, kind);
}

// The points between two such values, which have one dtype, in another.
extern "C" __global__ void write_midpoints(
    const Cutoff* upper, const Cutoff* lower, double weight, int kind, i64 scopes, int values, int dtype, char* out
) {
    EACH(s, scopes) write_real(out + s * width_of(dtype), dtype, point_between(upper[s], lower[s], weight, values, kind));
}

// +0.0 into every element of the blocks of a leaf that are dropped.
extern "C" __global__ void drop(const __grid_constant__ Decision decision, Leaf leaf, i64 scopes, i64 blocks) {
    i64 elements = leaf.elements;
    EACH(i, scopes * blocks * elements) {
        i64 b, e, s, j;
        split(i, elements, 2, b, e);
        split(b, blocks, scopes, s, j);
        int verdict = decide(decision, s, j);
        if (verdict == KEEP) continue;
        char* at = leaf.data + scope_offset(leaf, s) + block_offset(leaf, j) + element_offset(leaf, e);
        if (verdict == DROP)
            write_zero(at, leaf.dtype);
        else
            write_nan(at, leaf.dtype);
    }
}

// Every block times its number.
extern "C" __global__ void scale(const __grid_constant__ Numbers factors, Leaf leaf, i64 scopes, i64 blocks, i64 start) {
    i64 elements = leaf.elements;
    EACH(i, scopes * blocks * elements) {
        i64 b, e, s, j;
        split(i, elements, 2, b, e);
        split(b, blocks, scopes, s, j);
        char* at = leaf.data + scope_offset(leaf, s) + block_offset(leaf, j) + element_offset(leaf, e);
        scale_at(at, dtype_of(leaf), number_at(factors, s, start + j));
    }
}

// Blocks of one real number, in the metric of a second leaf if there is one.
extern "C" __global__ void soften(
    const __grid_constant__ Numbers thresholds, Leaf leaf, Leaf metric, int conditioned, int narrow, i64 scopes, i64 blocks, i64 start
) {
    EACH(i, scopes * blocks) {
        i64 s, j;
        split(i, blocks, scopes, s, j);
        char* at = leaf.data + scope_offset(leaf, s) + block_offset(leaf, j);
        double h = 1.0;
        if (conditioned)
            h = real_at(metric.data + scope_offset(metric, s) + block_offset(metric, j), metric.dtype);
        soften_at(at, dtype_of(leaf), number_at(thresholds, s, start + j), h, narrow);
    }
}

// Adds the number of elements that do not satisfy |x| <= eps.
extern "C" __global__ void count_nonzero(Leaf leaf, i64 scopes, i64 blocks, double eps, u64* count) {
    u64 found = 0;
    EACH(i, scopes * blocks * leaf.elements) {
        i64 b, e, s, j;
        split(i, leaf.elements, 2, b, e);
        split(b, blocks, scopes, s, j);
        const char* at = leaf.data + scope_offset(leaf, s) + block_offset(leaf, j) + element_offset(leaf, e);
        found += !(magnitude_at(at, dtype_of(leaf)) <= eps);
    }
    if (found) atomicAdd(count, found);
}

// Adds the squares of the magnitudes of all elements.
extern "C" __global__ void sum_squares(Leaf leaf, i64 scopes, i64 blocks, double* sum) {
    double found = 0.0;
    EACH(i, scopes * blocks * leaf.elements) {
        i64 b, e, s, j;
        split(i, leaf.elements, 2, b, e);
        split(b, blocks, scopes, s, j);
        double size = magnitude_at(leaf.data + scope_offset(leaf, s) + block_offset(leaf, j) + element_offset(leaf, e), dtype_of(leaf));
        found += size * size;
    }
    if (found != 0.0) atomicAdd(sum, found);
}

// --- elements that lie side by side, 16 bytes at a time -------------------------------------------

#if ELEMENT == FLOAT16 || ELEMENT == BFLOAT16
typedef u16 Stored;
#else
typedef u32 Stored;
#endif
#define VECTOR (16 / (i64)sizeof(Stored))

#if ELEMENT == FLOAT32 || ELEMENT == FLOAT16 || ELEMENT == BFLOAT16

union Vector {
    uint4 raw;
    Stored parts[16 / sizeof(Stored)];
};

// Calls use(i, vector) for the vectors of `from`; several are loaded before the first is used.
template <class Use>
__device__ inline void each_vector(const uint4* from, i64 count, Use use) {
    constexpr int loads = 4;
    i64 step = (i64)blockDim.x * loads;
    for (i64 base = blockIdx.x * step; base < count; base += gridDim.x * step) {
        Vector x[loads];
#pragma unroll
        for (int k = 0; k < loads; k++) {
            i64 i = base + k * blockDim.x + threadIdx.x;
            if (i < count) x[k].raw = from[i];
        }
#pragma unroll
        for (int k = 0; k < loads; k++) {
            i64 i = base + k * blockDim.x + threadIdx.x;
            if (i < count) use(i, x[k]);
        }
    }
}

// Ranked blocks of one element that lie side by side in `to`, as their deciding elements do in `from`; blocks % VECTOR == 0.
extern "C" __global__ void drop_dense(const __grid_constant__ Decision decision, const uint4* from, uint4* to, i64 scopes, i64 blocks) {
    Cutoff only = decision.cutoffs[0];
    each_vector(from, scopes * blocks / VECTOR, [&](i64 i, const Vector& x) {
        i64 s = 0, j = i * VECTOR;
        Cutoff cutoff = only;
        if (scopes > 1) {
            split(i * VECTOR, blocks, scopes, s, j);
            cutoff = decision.cutoffs[s];
        }
        Key border = (Key)cutoff.key;
        u32 dropped = 0, ties = 0;
#pragma unroll
        for (int u = 0; u < VECTOR; u++) {
            Key key = key_at((const char*)(x.parts + u), ELEMENT, decision.kind);
            dropped |= (u32)(key < border) << u;
            ties |= (u32)(key == border) << u;
        }
        if (ties) {
#pragma unroll
            for (int u = 0; u < VECTOR; u++)
                if (decision.start + j + u > cutoff.last) dropped |= ties & 1u << u;
        }
        // Lanes write in pairs, so that sectors of 32 bytes are written whole: worth nothing here, 9 % in rows.cu.
        if ((dropped | __shfl_xor_sync(__activemask(), dropped, 1)) == 0) return;
        Vector y = x;
        if (from != to) y.raw = to[i];
#pragma unroll
        for (int u = 0; u < VECTOR; u++) y.parts[u] = dropped >> u & 1 ? 0 : y.parts[u];
        to[i] = y.raw;
    });
}

// a - b, rounded once; an instruction that does not flush subnormals.
__device__ inline u32 difference(u32 a, u32 b) {
#ifdef NPSCOPE_EMULATED
    return narrowed(widened(a) - widened(b));
#else
    float result;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
    return __float_as_uint(result);
#endif
}

// a - b as float32 bits, for a > b >= 0, of which a format of few bits is made by one more rounding: the last bit is
// set where the difference is inexact, so that this gives what it would give of the exact one.
__device__ inline u32 difference_to_odd(u32 a, u32 b) {
    u32 near = difference(a, b), lost = difference(difference(a, near), b), size = lost & 0x7FFFFFFF;
    if ((near & 1) != 0 || size == 0 || size > 0x7F800000) return near;
    return lost >> 31 ? near - 1 : near + 1;
}

// As soften_at with h = 1, in float32.
__device__ inline Stored softened(Stored x, u32 limit, bool spoils) {
    u32 bits = float_bits_at((const char*)&x, ELEMENT), size = bits & 0x7FFFFFFF;
    if (spoils) {
        write_nan((char*)&x, ELEMENT);
        return x;
    }
    if (size > 0x7F800000 || limit == 0) return x;
    if (size <= limit) return 0;
    u32 sign = bits & 0x80000000;
#if ELEMENT == FLOAT16
    return half_of(difference_to_odd(size, limit) | sign);
#elif ELEMENT == BFLOAT16
    return bfloat_of(difference_to_odd(size, limit) | sign);
#else
    return difference(size, limit) | sign;
#endif
}

// Blocks of one element that lie side by side, softened from `from` into `to`, which may be `from`.
extern "C" __global__ void soften_dense(const __grid_constant__ Numbers thresholds, const uint4* from, uint4* to, i64 scopes, i64 blocks) {
    u32 limit = narrowed(thresholds.value);
    bool spoils = !(thresholds.value >= 0.0);
    each_vector(from, scopes * blocks / VECTOR, [&](i64 i, Vector x) {
        i64 s = 0, j = 0;
        if (!thresholds.constant) split(i * VECTOR, blocks, scopes, s, j);
#pragma unroll
        for (int u = 0; u < VECTOR; u++) {
            if (!thresholds.constant) {
                double t = number_in_memory(thresholds.leaf, s, j + u);
                limit = narrowed(t), spoils = !(t >= 0.0);
            }
            x.parts[u] = softened(x.parts[u], limit & 0x7FFFFFFF, spoils);
        }
        to[i] = x.raw;
    });
}

#endif
