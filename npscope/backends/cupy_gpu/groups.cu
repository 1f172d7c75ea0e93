// N:M: scopes of GROUP single elements that lie side by side, ranked in the registers of one thread.

#include "elements.cuh"

#ifndef GROUP
#define GROUP 4
#endif
#if ELEMENT == FLOAT16 || ELEMENT == BFLOAT16
typedef u16 Stored;
#else
typedef u32 Stored;
#endif
#define VECTOR (16 / (int)sizeof(Stored))
#define HELD (GROUP > VECTOR ? GROUP : VECTOR)  // elements of a thread: whole groups in whole vectors

union Vectors {
    uint4 raw[HELD / VECTOR];
    Stored parts[HELD];
};

// Keeps the first-ranked elements of every group of `from` in `to`, which may be `from`; `held` threads' worth.
extern "C" __global__ void keep_in_groups(const uint4* from, uint4* to, const __grid_constant__ Numbers keep, int kind, i64 held) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < held; i += (i64)gridDim.x * blockDim.x) {
        Vectors x;
#pragma unroll
        for (int v = 0; v < HELD / VECTOR; v++) x.raw[v] = from[i * (HELD / VECTOR) + v];
#pragma unroll
        for (int g = 0; g < HELD / GROUP; g++) {
            Key keys[GROUP];
            int ranks[GROUP];
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                keys[j] = key_at((const char*)(x.parts + g * GROUP + j), ELEMENT, kind);
                ranks[j] = 0;
            }
#pragma unroll
            for (int j = 1; j < GROUP; j++)
#pragma unroll
                for (int k = 0; k < j; k++) {
                    int later = keys[j] > keys[k];
                    ranks[k] += later;
                    ranks[j] += 1 - later;
                }
            double count = number_at(keep, i * (HELD / GROUP) + g, 0);
#pragma unroll
            for (int j = 0; j < GROUP; j++)
                if (!(ranks[j] < count)) x.parts[g * GROUP + j] = 0;
        }
#pragma unroll
        for (int v = 0; v < HELD / VECTOR; v++) to[i * (HELD / VECTOR) + v] = x.raw[v];
    }
}
