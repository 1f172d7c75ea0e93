// The proximal step in a diagonal metric, of blocks of any layout; owners as in owners.cuh.

#include "metric.cuh"

// mu of every block, in row-major order of (scope, block).
extern "C" __global__ void solve(
    Leaves leaves, Leaves metrics, const __grid_constant__ Numbers thresholds, Limits limits, i64 scopes, i64 blocks, i64 start, double* mus, int* failures
) {
    int lane = threadIdx.x % LANES;
    for (i64 i = (i64)blockIdx.x * OWNERS + threadIdx.x / LANES; i < scopes * blocks; i += (i64)gridDim.x * OWNERS) {
        Block block = {leaves, 0, 0};
        split(i, blocks, scopes, block.s, block.j);
        int failure = 0;
        double t = in_norm_dtype(number_at(thresholds, block.s, start + block.j), limits.narrow);
        double mu = solved(block, metrics, lane, t, limits, failure);
        if (lane == 0) {
            mus[i] = mu;
            if (failure) atomicOr(failures, failure);
        }
        owner_sync();
    }
}

// Every element of a leaf times h / (h + mu).
extern "C" __global__ void weigh(const double* mus, Leaf leaf, Leaf metric, i64 scopes, i64 blocks) {
    i64 elements = leaf.elements, count = scopes * blocks * elements;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        i64 b, e, s, j;
        split(i, elements, 2, b, e);
        split(b, blocks, scopes, s, j);
        double h = real_at(metric.data + scope_offset(metric, s) + block_offset(metric, j) + element_offset(metric, e), metric.dtype);
        char* at = leaf.data + scope_offset(leaf, s) + block_offset(leaf, j) + element_offset(leaf, e);
        scale_at(at, dtype_of(leaf), h / (h + mus[b]));
    }
}
