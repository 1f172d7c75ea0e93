// The cut between kept and dropped blocks of every scope: the key and the position of the last kept block.
//
// A block is kept if its key is larger, or equal and its position not later. Keys are read from the
// array itself where blocks are single elements, else from a table of norms. Nothing waits for the
// host: every pass is launched, and a scope that needs it no more returns at once.

#include "sources.cuh"

// --- a thread block for each scope ---------------------------------------------------------------

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

// The position of the need-th key that equals `key`, among positions [from, to).
__device__ inline void find_last(const Sources& sources, i64 s, Key key, i64 from, i64 to, u64 need, i64* last) {
    u64 seen = 0;
    for (i64 at = from; at < to; at += THREADS) {
        i64 j = at + threadIdx.x;
        u32 equal = j < to && key_of(sources, s, j) == key, total;
        u32 before = block_before(equal, total);
        if (equal && seen + before + 1 == need) *last = j;
        seen += total;
        if (seen >= need) return;
    }
}

extern "C" __global__ void decide_scopes(Sources sources, const __grid_constant__ Numbers keep, i64 low, i64 scopes, Cutoff* cutoffs) {
    __shared__ u32 bins[256];
    __shared__ u64 chosen, left;
    i64 blocks = sources.blocks;
    int t = threadIdx.x;
    for (i64 s = blockIdx.x; s < scopes; s += gridDim.x) {
        u64 need = wanted(keep, s, low, blocks);
        if (need == 0) {
            if (t == 0) cutoffs[s] = {LARGEST_KEY, -1};
            continue;
        }
        Key prefix = 0;
        for (int shift = KEY_BITS - 8; shift >= 0; shift -= 8) {
            bins[t] = 0;
            __syncthreads();
            for (i64 j = t; j < blocks; j += THREADS) {
                Key key = key_of(sources, s, j);
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
        if (t == 0) cutoffs[s] = {prefix, blocks};
        __syncthreads();
        if (need < ties) find_last(sources, s, prefix, 0, blocks, need, &cutoffs[s].last);
        __syncthreads();
    }
}

// --- large scopes: histograms of digits over many thread blocks ----------------------------------
//
// Digits of 12 bits from the top: of floats, the exponent and 3 or 4 bits more. The keys with the first digit of the cut are collected during the second
// pass if they fit a buffer; later passes then read only them.

#define DIGIT 12
#define BINS (1 << DIGIT)
#define COPIES 2  // histograms beside each other, so that lanes with one digit seldom meet
#define TILE_KEYS 16
#define TILE (THREADS * TILE_KEYS)
#define PASSES ((KEY_BITS + DIGIT - 1) / DIGIT)

struct Search {
    u64 prefix, need, collected;
    int collecting, done;
};

__device__ inline int digit_shift(int pass) {
    int shift = KEY_BITS - DIGIT * (pass + 1);
    return shift > 0 ? shift : 0;
}

__device__ inline int digit_width(int pass) { return pass < PASSES - 1 ? DIGIT : KEY_BITS - DIGIT * (PASSES - 1); }

extern "C" __global__ void large_start(const __grid_constant__ Numbers keep, i64 low, i64 blocks, i64 s0, i64 scopes, Search* searches, Cutoff* cutoffs) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= scopes) return;
    u64 need = wanted(keep, s0 + i, low, blocks);
    searches[i] = {0, need, 0, 0, need == 0};
    if (need == 0) cutoffs[s0 + i] = {LARGEST_KEY, -1};
}

// Counts the digits of one source's keys; thread blocks of row y work on scope s0 + y.
extern "C" __global__ void __launch_bounds__(THREADS, 4) large_histogram(
    Sources sources, i64 s0, int pass, Search* searches, u64* histograms, Key* buffer, i64 capacity, int first_source
) {
    __shared__ u32 bins[COPIES * BINS];
    __shared__ u64 place_in_buffer;
    Search& search = searches[blockIdx.y];
    if (search.done) return;
    bool from_buffer = pass > 1 && search.collecting, collects = pass == 1 && search.collecting;
    if (from_buffer && !first_source) return;
    i64 s = s0 + blockIdx.y, blocks = from_buffer ? (i64)search.collected : sources.first.blocks;
    if ((i64)blockIdx.x * TILE >= blocks) return;
    Key* kept = buffer + blockIdx.y * capacity;
    const Source& source = sources.first;
    const char* base = source.leaf.data + scope_offset(source.leaf, s);
    int shift = digit_shift(pass), above = shift + digit_width(pass), t = threadIdx.x;
    u32 digits = (1u << digit_width(pass)) - 1, *own = bins + (t % COPIES) * BINS;
    Key prefix = (Key)search.prefix;
    for (int b = t; b < COPIES * BINS; b += THREADS) bins[b] = 0;
    __syncthreads();
    for (i64 tile = (i64)blockIdx.x * TILE; tile < blocks; tile += (i64)gridDim.x * TILE) {
        Key keys[TILE_KEYS];
        u32 matches = 0;
#pragma unroll
        for (int v = 0; v < TILE_KEYS / VECTOR; v++) {
            i64 at = tile + (i64)(v * THREADS + t) * VECTOR;
            if (from_buffer) {
#pragma unroll
                for (int u = 0; u < VECTOR; u++) keys[v * VECTOR + u] = at + u < blocks ? kept[at + u] : 0;
            } else {
#if DENSE
                load_keys(sources, base, s, at, blocks, keys + v * VECTOR);
#else
                keys[v] = at < blocks ? key_at(base + block_offset(source.leaf, at), dtype_of(source.leaf), sources.kind) : 0;
#endif
            }
#pragma unroll
            for (int u = 0; u < VECTOR; u++) {
                Key key = keys[v * VECTOR + u];
                bool match = at + u < blocks && (pass == 0 || key >> (pass ? above : 0) == prefix);
                matches |= (u32)match << (v * VECTOR + u);
            }
        }
        u32 run = 0, last = 0;  // equal digits in a row are added at once
#pragma unroll
        for (int k = 0; k < TILE_KEYS; k++) {
            u32 digit = (u32)(keys[k] >> shift) & digits;
            if (matches >> k & 1) {
                if (run && digit != last) {
                    atomicAdd(own + last, run);
                    run = 0;
                }
                last = digit;
                run++;
            }
        }
        if (run) atomicAdd(own + last, run);
        if (collects) {
            u32 total, before = block_before(__popc(matches), total);
            if (t == 0) place_in_buffer = total ? atomicAdd(&search.collected, (u64)total) : 0;
            __syncthreads();
            Key* to = kept + place_in_buffer + before;
#pragma unroll
            for (int k = 0; k < TILE_KEYS; k++)
                if (matches >> k & 1) *to++ = keys[k];
            __syncthreads();
        }
    }
    __syncthreads();
    for (int b = t; b < BINS; b += THREADS) {
        u32 count = 0;
        for (int c = 0; c < COPIES; c++) count += bins[c * BINS + b];
        if (count) atomicAdd(histograms + blockIdx.y * BINS + b, (u64)count);
    }
}

__shared__ u64 wide_totals[THREADS / 32];

__device__ inline u64 wide_before(u64 x) {
    u64 sum = x;
    for (int d = 1; d < 32; d <<= 1) {
        u64 other = __shfl_up_sync(FULL, sum, d);
        if (threadIdx.x % 32 >= d) sum += other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 31) wide_totals[threadIdx.x / 32] = sum;
    __syncthreads();
    u64 before = sum - x;
    for (int w = 0; w < threadIdx.x / 32; w++) before += wide_totals[w];
    return before;
}

// Finds the bin, from the top (or the bottom), in which the need-th entry lies. All bins are cleared.
__device__ inline void find_bin(u64* histogram, bool from_top, u64 need, u64* bin, u64* left, u64* inside) {
    constexpr int each = BINS / THREADS;
    u64 counts[each], sum = 0;
    for (int k = 0; k < each; k++) {
        int b = threadIdx.x * each + k;
        sum += counts[k] = histogram[from_top ? BINS - 1 - b : b];
    }
    u64 before = wide_before(sum);
    for (int k = 0; k < each; k++) {
        int b = threadIdx.x * each + k;
        if (before < need && need <= before + counts[k])
            *bin = from_top ? BINS - 1 - b : b, *left = need - before, *inside = counts[k];
        before += counts[k];
        histogram[b] = 0;
    }
    __syncthreads();
}

// One thread block for each scope: the next digit of the cut.
extern "C" __global__ void large_settle(
    i64 s0, i64 blocks, int pass, Search* searches, u64* histograms, i64 capacity, Cutoff* cutoffs
) {
    __shared__ u64 bin, left, inside;
    Search& search = searches[blockIdx.x];
    if (search.done) return;
    u64 need = search.need;
    find_bin(histograms + blockIdx.x * BINS, true, need, &bin, &left, &inside);
    if (threadIdx.x) return;
    search.prefix = search.prefix << digit_width(pass) | bin;
    search.need = left;
    if (pass == 0) search.collecting = inside <= (u64)capacity;
    if (pass == PASSES - 1) {
        cutoffs[s0 + blockIdx.x] = {search.prefix, blocks};
        search.done = left == inside;
    }
}

// Where not all ties are kept: how many lie in each of BINS stretches of positions.
extern "C" __global__ void large_ties(Sources sources, i64 s0, i64 blocks, Search* searches, u64* histograms) {
    Search& search = searches[blockIdx.y];
    if (search.done) return;
    const Source& source = sources.first;
    i64 s = s0 + blockIdx.y, stretch = (blocks + BINS - 1) / BINS;
    const char* base = source.leaf.data + scope_offset(source.leaf, s);
    Key key = (Key)search.prefix;
    for (i64 b = blockIdx.x; b < BINS; b += gridDim.x) {
        i64 from = b * stretch - source.start, to = from + stretch;
        if (from < 0) from = 0;
        if (to > source.blocks) to = source.blocks;
        u32 equal = 0;
        for (i64 j = from + threadIdx.x; j < to; j += THREADS)
            equal += key_at(base + block_offset(source.leaf, j), dtype_of(source.leaf), sources.kind) == key;
        u32 total;
        block_before(equal, total);
        if (threadIdx.x == 0 && total) atomicAdd(histograms + blockIdx.y * BINS + b, (u64)total);
    }
}

// The position of the last kept tie.
extern "C" __global__ void large_last(Sources sources, i64 s0, Search* searches, u64* histograms, Cutoff* cutoffs) {
    __shared__ u64 bin, left, inside;
    Search& search = searches[blockIdx.x];
    if (search.done) return;
    find_bin(histograms + blockIdx.x * BINS, false, search.need, &bin, &left, &inside);
    i64 s = s0 + blockIdx.x, stretch = (sources.blocks + BINS - 1) / BINS, from = (i64)bin * stretch;
    i64 to = from + stretch < sources.blocks ? from + stretch : sources.blocks;
    find_last(sources, s, (Key)search.prefix, from, to, left, &cutoffs[s].last);
}
