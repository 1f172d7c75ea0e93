// Scopes that a thread block works on: sums over its threads, and the cut of a scope.

#pragma once

#include "sources.cuh"

__shared__ u32 warp_totals[THREADS / 32];

// The sum over all threads before this one, and over all of them.
__device__ inline u32 block_before(u32 x, u32& total) {
    u32 before = warp_before(x);
    __syncthreads();
    if (threadIdx.x % 32 == 31) warp_totals[threadIdx.x / 32] = before + x;
    __syncthreads();
    total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w == threadIdx.x / 32) before += total;
        total += warp_totals[w];
    }
    return before;
}

// The position of the need-th key_at(j) that equals `key`, among positions [from, to): one thread writes it to `last`.
template <class Read>
__device__ inline void find_last(const Read& key_at, Key key, i64 from, i64 to, u64 need, i64* last) {
    u64 seen = 0;
    for (i64 at = from; at < to; at += THREADS) {
        i64 j = at + threadIdx.x;
        u32 equal = j < to && key_at(j) == key, total;
        u32 before = block_before(equal, total);
        if (equal && seen + before + 1 == need) *last = j;
        seen += total;
        if (seen >= need) return;
    }
}

// The cut that keeps `need` of the keys key_at(j), j < blocks, digit by digit; the same in every thread.
template <class Read>
__device__ inline Cutoff cut_of_scope(const Read& key_at, i64 blocks, u64 need) {
    __shared__ u32 bins[256];
    __shared__ u64 chosen, left;
    __shared__ i64 last;
    if (need == 0) return {LARGEST_KEY, -1};
    int t = threadIdx.x;
    Key prefix = 0;
    for (int shift = KEY_BITS - 8; shift >= 0; shift -= 8) {
        bins[t] = 0;
        __syncthreads();
        for (i64 j = t; j < blocks; j += THREADS) {
            Key key = key_at(j);
            if (shift == KEY_BITS - 8 || key >> (shift + 8) == prefix) atomicAdd(bins + (key >> shift & 255), 1u);
        }
        __syncthreads();
        u32 count = bins[255 - t], total;
        u32 before = block_before(count, total);
        if (before < need && need <= before + (u64)count) chosen = 255 - t, left = need - before;
        __syncthreads();
        prefix = prefix << 8 | (Key)chosen;
        need = left;
        __syncthreads();
    }
    u32 ties = bins[(int)(prefix & 255)];
    if (t == 0) last = blocks;
    __syncthreads();
    if (need < ties) find_last(key_at, prefix, 0, blocks, need, &last);
    __syncthreads();
    return {prefix, last};
}
