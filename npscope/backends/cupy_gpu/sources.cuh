// Where the keys of a scope are read: from the array itself where blocks are single elements, else from a table of norms.

#pragma once

#include "decisions.cuh"

#ifndef DENSE
#define DENSE 0  // keys of a scope lie side by side, on 16-byte borders
#endif
#define THREADS 256
#define FULL 0xFFFFFFFF

// Numbers that rank: those of blocks [start, start + blocks) of every scope.
struct Source {
    i64 start, blocks;
    Leaf leaf;
};

struct Sources {
    int count, kind;
    i64 blocks;  // of a scope, over all sources
    const Source* more;
    Source first;

    __device__ const Source& operator[](int i) const { return i ? more[i - 1] : first; }
};

__device__ inline Key key_of(const Sources& sources, i64 s, i64 j) {
    int i = 0;
    while (j >= sources[i].start + sources[i].blocks) i++;
    const Leaf& leaf = sources[i].leaf;
    const char* at = leaf.data + scope_offset(leaf, s) + block_offset(leaf, j - sources[i].start);
    return key_at(at, dtype_of(leaf), sources.kind);
}

// How many blocks to keep, in [low, blocks].
__device__ inline i64 wanted(const Numbers& keep, i64 s, i64 low, i64 blocks) {
    i64 count = (i64)number_at(keep, s, 0);
    return count < low ? low : count > blocks ? blocks : count;
}

// --- warps and keys ------------------------------------------------------------------------------

__device__ inline u32 warp_sum(u32 x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(FULL, x);
#else
    for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(FULL, x, d);
    return x;
#endif
}

__device__ inline u32 warp_before(u32 x) {
    u32 sum = x;
    for (int d = 1; d < 32; d <<= 1) {
        u32 other = __shfl_up_sync(FULL, sum, d);
        if (threadIdx.x % 32 >= d) sum += other;
    }
    return sum - x;
}

#if !DENSE
#define VECTOR 1
#elif ELEMENT == FLOAT16 || ELEMENT == BFLOAT16
#define VECTOR 8
typedef u16 Stored;
#elif KEY_BITS == 32
#define VECTOR 4
typedef u32 Stored;
#else
#define VECTOR 2
typedef u64 Stored;
#endif

// Keys of positions at .. at + VECTOR; absent ones are 0.
__device__ inline void load_keys(const Sources& sources, const char* base, i64 s, i64 at, i64 blocks, Key* keys) {
#if DENSE
    uint4 raw = {0, 0, 0, 0};
    if (at < blocks) raw = *(const uint4*)(base + at * (i64)sizeof(Stored));
    const Stored* parts = (const Stored*)&raw;
#pragma unroll
    for (int u = 0; u < VECTOR; u++)
        keys[u] = at < blocks ? key_at((const char*)(parts + u), dtype_of(sources.first.leaf), sources.kind) : 0;
#else
    keys[0] = at < blocks ? key_of(sources, s, at) : 0;
#endif
}
