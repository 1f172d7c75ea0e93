// Scopes of up to 32 * KEYS blocks: a warp owns a scope and holds its keys in registers.

#include "sources.cuh"

#ifndef KEYS
#define KEYS 32
#endif

__device__ inline u32 warp_most(u32 x) {
    for (int d = 16; d; d >>= 1) {
        u32 other = __shfl_xor_sync(FULL, x, d);
        if (other > x) x = other;
    }
    return x;
}

// The cut that keeps `count` of the keys of a warp, the same in every lane.
__device__ inline Cutoff cut_of(const Key (&keys)[KEYS], u32 count, i64 blocks, int lane) {
    if (count == 0) return {LARGEST_KEY, -1};
    // The largest key that at least `count` keys reach, bit by bit; exactly `count` reach it: done early.
    Key key = 0;
    for (int bit = KEY_BITS - 1; bit >= 0; bit--) {
        Key candidate = key | (Key)1 << bit;
        u32 reached = 0;
#pragma unroll
        for (int k = 0; k < KEYS; k++) reached += keys[k] >= candidate;
        reached = warp_sum(reached);
        if (reached >= count) key = candidate;
        if (reached == count) return {key, blocks};
    }
    u32 above = 0;
#pragma unroll
    for (int k = 0; k < KEYS; k++) above += keys[k] > key;
    // Ties in order of position: vector by vector, lane by lane.
    u32 need = count - warp_sum(above), total = 0, last = 0;
#pragma unroll
    for (int v = 0; v < KEYS / VECTOR; v++) {
        i64 at = (i64)(v * 32 + lane) * VECTOR;
        u32 equal = 0;
#pragma unroll
        for (int u = 0; u < VECTOR; u++) equal += keys[v * VECTOR + u] == key && at + u < blocks;
        u32 rank = total + warp_before(equal);
#pragma unroll
        for (int u = 0; u < VECTOR; u++)
            if (keys[v * VECTOR + u] == key && at + u < blocks && ++rank == need) last = (u32)(at + u);
        total += warp_sum(equal);
    }
    return {key, warp_most(last)};
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) decide_rows(Sources sources, const __grid_constant__ Numbers keep, i64 low, i64 scopes, Cutoff* cutoffs) {
    int lane = threadIdx.x % 32;
    i64 blocks = sources.blocks;
    for (i64 s = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; s < scopes; s += (i64)gridDim.x * (THREADS / 32)) {
        u32 count = (u32)wanted(keep, s, low, blocks);
        const char* base = sources.first.leaf.data + (DENSE ? scope_offset(sources.first.leaf, s) : 0);
        Key keys[KEYS];
#pragma unroll
        for (int v = 0; v < KEYS / VECTOR; v++)
            load_keys(sources, base, s, (i64)(v * 32 + lane) * VECTOR, blocks, keys + v * VECTOR);
        Cutoff cutoff = cut_of(keys, count, blocks, lane);
        if (cutoff.last == blocks) {
            // Its key is a bound that no key need have: the cut is the smallest key that reaches it.
            Key least = LARGEST_KEY;
#pragma unroll
            for (int k = 0; k < KEYS; k++)
                if (keys[k] >= (Key)cutoff.key && keys[k] < least) least = keys[k];
            for (int d = 16; d; d >>= 1) {
                Key other = __shfl_xor_sync(FULL, least, d);
                if (other < least) least = other;
            }
            cutoff.key = least;
        }
        if (lane == 0) cutoffs[s] = cutoff;
    }
}

#if DENSE
// Decides and writes at once: rows of `from` lie side by side, and so do those of `to`, which may be `from`.
extern "C" __global__ void __launch_bounds__(THREADS, 3) keep_rows(Sources sources, const __grid_constant__ Numbers keep, i64 scopes, char* to) {
    int lane = threadIdx.x % 32;
    i64 blocks = sources.blocks;
    const char* from = sources.first.leaf.data;
    for (i64 s = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; s < scopes; s += (i64)gridDim.x * (THREADS / 32)) {
        u32 count = (u32)wanted(keep, s, 0, blocks);
        i64 row = s * blocks * (i64)sizeof(Stored);
        Key keys[KEYS];
#pragma unroll
        for (int v = 0; v < KEYS / VECTOR; v++)
            load_keys(sources, from + row, s, (i64)(v * 32 + lane) * VECTOR, blocks, keys + v * VECTOR);
        Cutoff cutoff = cut_of(keys, count, blocks, lane);
        Key border = (Key)cutoff.key;
        i64 last = cutoff.last;
        // What stays is read again: keeping it beside its keys would halve the warps that fit.
#pragma unroll
        for (int v = 0; v < KEYS / VECTOR; v++) {
            i64 at = (i64)(v * 32 + lane) * VECTOR;
            u32 dropped = 0;
#pragma unroll
            for (int u = 0; u < VECTOR; u++) {
                Key key = keys[v * VECTOR + u];
                dropped |= (u32)(key < border || (key == border && at + u > last)) << u;
            }
            u32 nearby = dropped | __shfl_xor_sync(FULL, dropped, 1);  // whole sectors, as in writing.cu
            if (at >= blocks || (nearby == 0 && from == to)) continue;
            union {
                uint4 raw;
                Stored parts[VECTOR];
            } x;
            x.raw = *(const uint4*)(from + row + at * (i64)sizeof(Stored));
#pragma unroll
            for (int u = 0; u < VECTOR; u++)
                if (dropped >> u & 1) x.parts[u] = 0;
            *(uint4*)(to + row + at * (i64)sizeof(Stored)) = x.raw;
        }
    }
}
#endif
