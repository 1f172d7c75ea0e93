// Whole operations on small problems, one launch each: norms, what is decided by them, and what is made of that.
//
// What is common to small_scopes.cu and small_blocks.cu; small.py says which problems are small. Decisions lie in shared memory until they are written; the
// arithmetic is that of the kernels for arrays of any size. Owners, as in owners.cuh, measure blocks and write them.

#pragma once

#define MAX_LOOPS 8
#include "decisions.cuh"
#include "metric.cuh"
#include "norms.cuh"

#define MOST_LEAVES 5

enum Task {
    KTH, MIDPOINT, BLOCK_MASK, ELEMENT_MASK, PRUNE,                          // blocks of a scope compete
    NORMS, THRESHOLD, SHRINK, SHRINK_IN_METRIC, APPLY_MASK, SCALE, SOFTEN    // every block for itself
};

// Leaves that share their blocks, which stand in columns [start, start + blocks) of a scope.
struct Part {
    int first, leaves;
    int single;  // blocks are single elements, which rank as they are
    i64 start, blocks;
    Measure measure;
};

struct Problem {
    int task, parts, kind;
    int dtype, values;  // of a result that is none of the leaves, and of k-th values
    int reads, moves, weighs;  // whether there are leaves in `read`, `old`, `metric`
    i64 scopes, blocks;  // blocks of a scope, over all parts
    i64 low;             // counts are clamped to [low, blocks]
    double weight;       // of the lower of two values
    Limits limits;
    Numbers numbers;     // counts, thresholds, flags or factors
    char* out;
    Part part[MOST_LEAVES];
    Leaf read[MOST_LEAVES];     // what ranks or is measured, if it is not what is written
    Leaf old[MOST_LEAVES];      // the elements as they were, if they were elsewhere
    Leaf written[MOST_LEAVES];
    Leaf metric[MOST_LEAVES];
};

// The leaves of a part, for functions that take them together.
__device__ inline Leaves leaves_of(const Leaf* all, const Part& part) {
    return {part.leaves, all + part.first + 1, all[part.first]};
}

// Those by which a part is ranked or measured.
__device__ inline Leaves measured_leaves(const Problem& problem, const Part& part) {
    return leaves_of(problem.reads ? problem.read : problem.moves ? problem.old : problem.written, part);
}

__device__ inline Size measured(const Block& block, const Measure& measure, int lane) {
#if LANES > 1
    __shared__ i64 all_limbs[OWNERS][LIMBS];
    i64* limbs = all_limbs[threadIdx.x / LANES];
#else
    i64 limbs[LIMBS];
#endif
    return size_of(block, measure, lane, elements_of(block.leaves), nullptr, 0, limbs);
}

__device__ inline void copy_element(char* to, const char* from, int dtype) {
    if (to == from) return;
    switch (width_of(dtype)) {
        case 16: ((u64*)to)[0] = ((const u64*)from)[0]; ((u64*)to)[1] = ((const u64*)from)[1]; break;
        case 8: *(u64*)to = *(const u64*)from; break;
        case 4: *(u32*)to = *(const u32*)from; break;
        case 2: *(u16*)to = *(const u16*)from; break;
        default: *(u8*)to = *(const u8*)from;
    }
}

__device__ inline char* block_of(const Leaf& leaf, i64 s, i64 j) {
    return leaf.data + scope_offset(leaf, s) + block_offset(leaf, j);
}

// Calls use(to, from, weight) for the elements that a lane has of a block: where each is written, where it was, its weight.
template <class Use>
__device__ inline void each_element(const Problem& problem, const Part& part, i64 s, i64 j, int lane, Use use) {
    for (int l = part.first; l < part.first + part.leaves; l++) {
        const Leaf &written = problem.written[l], &old = problem.old[l], &metric = problem.metric[l];
        char *to = block_of(written, s, j), *from = problem.moves ? block_of(old, s, j) : to;
        const char* weights = problem.weighs ? block_of(metric, s, j) : nullptr;
        for (i64 e = lane; e < written.elements; e += LANES) {
            i64 offset = element_offset(written, e);
            double weight = weights ? real_at(weights + element_offset(metric, e), metric.dtype) : 1.0;
            use(to + offset, from + (problem.moves ? element_offset(old, e) : offset), written.dtype, weight);
        }
    }
}
