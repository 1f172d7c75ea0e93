// Small problems in which every block is for itself: OWNERS blocks for each thread block.

#include "small.cuh"

#ifndef METRIC
#define METRIC 0  // whether this is the proximal step in a metric
#endif

// What becomes of a block: the number that its elements are multiplied by.
__device__ inline double decided(const Problem& problem, const Measure& measure, Size size, double number) {
    switch (problem.task) {
        case THRESHOLD: {
            int verdict = by_threshold(size.norm, measure.narrow, number);
            return verdict == SPOIL ? not_a_number() : verdict;
        }
        case APPLY_MASK: return number != 0.0;
        case SHRINK: return shrink_factor(size.norm, size.wide, in_norm_dtype(number, measure.narrow));
        default: return number;
    }
}

// An owner for each block of a part; parts in rows of the grid.
extern "C" __global__ void __launch_bounds__(THREADS) each_small(const __grid_constant__ Problem problem) {
    __shared__ Leaves leaves;
    const Part& part = problem.part[blockIdx.y];
    i64 i = (i64)blockIdx.x * OWNERS + threadIdx.x / LANES, s, j;
    int lane = threadIdx.x % LANES;
    if (threadIdx.x == 0) leaves = measured_leaves(problem, part);
#if METRIC
    __shared__ Leaves metric;
    if (threadIdx.x == 0) metric = leaves_of(problem.metric, part);
#endif
    __syncthreads();
    if (i >= problem.scopes * part.blocks) return;
    split(i, part.blocks, problem.scopes, s, j);
    Block block = {leaves, s, j};
    double number = number_at(problem.numbers, s, part.start + j);
#if METRIC
    int failure = 0;
    double factor = solved(block, metric, lane, in_norm_dtype(number, part.measure.narrow), problem.limits, failure);
#else
    Size size = {0.0, 0.0};
    if (problem.task <= SHRINK) size = measured(block, part.measure, lane);
    if (problem.task == NORMS) {
        i64 at = s * problem.blocks + part.start + j;
        if (lane == 0) write_real(problem.out + at * width_of(problem.dtype), problem.dtype, size.norm);
        return;
    }
    double factor = decided(problem, part.measure, size, number);
#endif
    owner_sync();
    each_element(problem, part, s, j, lane, [&](char* to, const char* from, int dtype, double weight) {
        copy_element(to, from, dtype);
        if (!METRIC && problem.task == SOFTEN)
            soften_at(to, dtype, factor, weight, part.measure.narrow);
        else
            scale_at(to, dtype, METRIC ? weight / (weight + factor) : factor);
    });
}
