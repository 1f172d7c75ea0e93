// The cut of scopes of up to 32 * KEYS blocks: a warp owns a scope and holds its keys in registers.

#include "sources.cuh"

#ifndef KEYS
#define KEYS 32
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 3) decide_rows(Sources sources, const __grid_constant__ Numbers keep, i64 low, i64 scopes, Cutoff* cutoffs) {
    int lane = threadIdx.x % 32;
    i64 blocks = sources.blocks;
    for (i64 s = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; s < scopes; s += (i64)gridDim.x * (THREADS / 32)) {
        i64 count = wanted(keep, s, low, blocks);
        if (count == 0) {
            if (lane == 0) cutoffs[s] = {LARGEST_KEY, -1};
            continue;
        }
        const char* base = sources.first.leaf.data + (DENSE ? scope_offset(sources.first.leaf, s) : 0);
        Key keys[KEYS];
#pragma unroll
        for (int v = 0; v < KEYS / VECTOR; v++)
            load_keys(sources, base, s, (i64)(v * 32 + lane) * VECTOR, blocks, keys + v * VECTOR);
        // The largest key that at least `count` keys reach, bit by bit; exactly `count` reach it: done early.
        Key key = 0;
        bool split_ties = true;
        for (int bit = KEY_BITS - 1; bit >= 0; bit--) {
            Key candidate = key | (Key)1 << bit;
            u32 reached = 0;
#pragma unroll
            for (int k = 0; k < KEYS; k++) reached += keys[k] >= candidate;
            reached = warp_sum(reached);
            if (reached >= count) key = candidate;
            if (reached == count) {
                split_ties = false;
                break;
            }
        }
        u32 before = 0, total = 0;
        if (split_ties) {
            u32 above = 0;
#pragma unroll
            for (int k = 0; k < KEYS; k++) above += keys[k] > key;
            before = warp_sum(above);
        } else {
            // `key` is a bound that no key need have: the cut is the smallest key that reaches it.
            Key least = LARGEST_KEY;
#pragma unroll
            for (int k = 0; k < KEYS; k++)
                if (keys[k] >= key && keys[k] < least) least = keys[k];
            for (int d = 16; d; d >>= 1) {
                Key other = __shfl_xor_sync(FULL, least, d);
                if (other < least) least = other;
            }
            if (lane == 0) cutoffs[s] = {least, blocks};
            continue;
        }
        // Ties in order of position: vector by vector, lane by lane.
        u32 need = (u32)count - before;
#pragma unroll
        for (int v = 0; v < KEYS / VECTOR; v++) {
            i64 at = (i64)(v * 32 + lane) * VECTOR;
            u32 equal = 0;
#pragma unroll
            for (int u = 0; u < VECTOR; u++) equal += keys[v * VECTOR + u] == key && at + u < blocks;
            u32 rank = total + warp_before(equal);
#pragma unroll
            for (int u = 0; u < VECTOR; u++)
                if (keys[v * VECTOR + u] == key && at + u < blocks && ++rank == need) cutoffs[s] = {key, at + u};
            total += warp_sum(equal);
        }
    }
}
