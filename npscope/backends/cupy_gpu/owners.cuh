// Blocks and the LANES threads that own one: 1, a warp of 32, or a whole thread block of 256.

#pragma once

#include "sums.cuh"

#ifndef LANES
#define LANES 1
#endif
#define THREADS 256
#define OWNERS (THREADS / LANES)

struct Block {
    const Leaves& leaves;
    i64 s, j;

    __device__ const char* base(const Leaf& leaf) const {
        return leaf.data + scope_offset(leaf, s) + block_offset(leaf, j);
    }
};

__device__ inline i64 elements_of(const Leaves& leaves) {
    i64 total = 0;
    for (int l = 0; l < leaves.count; l++) total += leaves[l].elements;
    return total;
}

__device__ inline double larger(double top, double x) { return x > top || x != x ? x : top; }

// --- what the lanes of an owner do together -----------------------------------------------------

#if LANES == 256
__shared__ double exchange[2][THREADS / 32];
#endif

__device__ inline void owner_sync() {
#if LANES == 256
    __syncthreads();
#elif LANES == 32
    __syncwarp();
#endif
}

__device__ inline double from_lane(double x, int distance) { return __shfl_down_sync(0xFFFFFFFF, x, distance); }

// The sum over all lanes of an owner, the same in each of them.
__device__ inline Pair total_of(Pair sum) {
#if LANES > 1
    for (int d = 16; d; d >>= 1) accumulate(sum, {from_lane(sum.hi, d), from_lane(sum.lo, d)});
    sum = {__shfl_sync(0xFFFFFFFF, sum.hi, 0), __shfl_sync(0xFFFFFFFF, sum.lo, 0)};
#endif
#if LANES == 256
    int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) exchange[0][warp] = sum.hi, exchange[1][warp] = sum.lo;
    __syncthreads();
    sum = {exchange[0][0], exchange[1][0]};
    for (int w = 1; w < THREADS / 32; w++) accumulate(sum, {exchange[0][w], exchange[1][w]});
#endif
    return sum;
}

__device__ inline double largest_of(double top) {
#if LANES > 1
    for (int d = 16; d; d >>= 1) top = larger(top, __shfl_xor_sync(0xFFFFFFFF, top, d));
#endif
#if LANES == 256
    int warp = threadIdx.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) exchange[0][warp] = top;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) top = larger(top, exchange[0][w]);
#endif
    return top;
}
