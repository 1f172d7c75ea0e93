// Small problems in which the blocks of a scope compete: a thread block for each scope.

#include "small.cuh"
#include "scopes.cuh"

#define MOST_KEYS 4096

// A thread block for each scope.
extern "C" __global__ void __launch_bounds__(THREADS) rank_small(const __grid_constant__ Problem problem) {
    __shared__ Key keys[MOST_KEYS];
    __shared__ Leaves leaves;
    i64 s = blockIdx.x, blocks = problem.blocks;
    int lane = threadIdx.x % LANES;
    for (int p = 0; p < problem.parts; p++) {
        const Part& part = problem.part[p];
        __syncthreads();
        if (threadIdx.x == 0) leaves = measured_leaves(problem, part);
        __syncthreads();
        for (i64 j = threadIdx.x / LANES; j < part.blocks; j += OWNERS) {
            Block block = {leaves, s, j};
            Key key;
            if (part.single) {
                key = key_at(block.base(leaves.first), leaves.first.dtype, problem.kind);
            } else {
                double norm = measured(block, part.measure, lane).norm;
#if KEY_BITS == 32
                key = key_of_bits(narrowed(norm));
#else
                key = key_of_double(norm);
#endif
            }
            if (lane == 0) keys[part.start + j] = key;
            owner_sync();
        }
    }
    __syncthreads();
    auto key_of_block = [&](i64 j) { return keys[j]; };
    i64 need = wanted(problem.numbers, s, problem.low, blocks);
    Cutoff cutoff = cut_of_scope(key_of_block, blocks, need);
    char* out = problem.out + s * width_of(problem.dtype);
    if (problem.task == KTH) {
        if (threadIdx.x == 0) write_key(out, problem.dtype, (Key)cutoff.key, problem.kind);
        return;
    }
    if (problem.task == MIDPOINT) {
        Cutoff next = cut_of_scope(key_of_block, blocks, need < blocks ? need + 1 : need);
        if (threadIdx.x) return;
        double point = point_between(cutoff, next, problem.weight, problem.values, problem.kind);
        write_real(out, problem.dtype, point);
        return;
    }
    if (problem.task == BLOCK_MASK) {
        for (i64 j = threadIdx.x; j < blocks; j += THREADS)
            problem.out[s * blocks + j] = by_rank(cutoff, keys[j], j);
        return;
    }
    for (int p = 0; p < problem.parts; p++) {
        const Part& part = problem.part[p];
        for (i64 j = threadIdx.x / LANES; j < part.blocks; j += OWNERS) {
            bool kept = by_rank(cutoff, keys[part.start + j], part.start + j);
            if (kept && problem.task == PRUNE && !problem.moves) continue;
            each_element(problem, part, s, j, lane, [&](char* to, const char* from, int dtype, double weight) {
                if (problem.task == ELEMENT_MASK)
                    *to = kept;
                else if (kept)
                    copy_element(to, from, dtype);
                else
                    write_zero(to, dtype);
            });
        }
    }
}
