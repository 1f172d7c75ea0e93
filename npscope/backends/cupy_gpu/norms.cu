// Norms of blocks of any layout, into tables; owners as in owners.cuh.

#include "norms.cuh"

#define CHUNK (1 << 16)  // elements of one partial sum of a large block

// Sums of CHUNK elements each, of blocks too large for one owner: partials[block][chunk].
extern "C" __global__ void partial_sums(
    Leaves leaves, Measure measure, i64 scopes, i64 blocks, i64 chunks, Partial* partials
) {
#if LANES == 256
    for (i64 piece = blockIdx.x; piece < scopes * blocks * chunks; piece += gridDim.x) {
        i64 i = piece / chunks, from = (piece - i * chunks) * CHUNK, s, j;
        split(i, blocks, scopes, s, j);
        Block block = {leaves, s, j};
        Pair sum = {0.0, 0.0};
        double top = 0.0;
        add_elements(block, from, from + CHUNK, threadIdx.x, LANES, measure.order, sum, top);
        sum = total_of(sum);
        top = largest_of(top);
        if (threadIdx.x == 0) partials[piece] = {sum.hi, sum.lo, top};
    }
#endif
}

// Norms (or factors) of the blocks of a part, into columns [start, start + blocks) of a table with `row` columns.
extern "C" __global__ void norms(
    Leaves leaves, Measure measure, const __grid_constant__ Numbers thresholds, i64 scopes, i64 blocks, i64 row, i64 start,
    const Partial* partials, i64 chunks, char* out
) {
#if LANES > 1
    __shared__ i64 all_limbs[OWNERS][LIMBS];
    i64* limbs = all_limbs[threadIdx.x / LANES];
#else
    i64 limbs[LIMBS];
#endif
    int lane = threadIdx.x % LANES;
    i64 elements = elements_of(leaves);
    for (i64 i = (i64)blockIdx.x * OWNERS + threadIdx.x / LANES; i < scopes * blocks; i += (i64)gridDim.x * OWNERS) {
        Block block = {leaves, 0, 0};
        split(i, blocks, scopes, block.s, block.j);
        Size size = size_of(block, measure, lane, elements, partials + i * chunks, chunks, limbs);
        if (lane == 0) {
            i64 at = block.s * row + start + block.j;
            if (measure.output == FACTOR)
                ((double*)out)[at] = shrink_factor(
                    size.norm, size.wide, in_norm_dtype(number_at(thresholds, block.s, start + block.j), measure.narrow)
                );
            else if (measure.wide_output)
                ((double*)out)[at] = size.norm;
            else
                ((u32*)out)[at] = narrowed(size.norm);
        }
        owner_sync();
    }
}
