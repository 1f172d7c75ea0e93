// The cut between kept and dropped blocks of every scope: the key and the position of the last kept block.
//
// A block is kept if its key is larger, or equal and its position not later. Keys are read from the
// array itself where blocks are single elements, else from a table of norms. Nothing waits for the
// host: every pass is launched, and a scope that needs it no more returns at once.

#include "scopes.cuh"

// --- a thread block for each scope ---------------------------------------------------------------

extern "C" __global__ void decide_scopes(Sources sources, const __grid_constant__ Numbers keep, i64 low, i64 scopes, Cutoff* cutoffs) {
    i64 blocks = sources.blocks;
    for (i64 s = blockIdx.x; s < scopes; s += gridDim.x) {
        Cutoff cutoff = cut_of_scope([&](i64 j) { return key_of(sources, s, j); }, blocks, wanted(keep, s, low, blocks));
        if (threadIdx.x == 0) cutoffs[s] = cutoff;
    }
}

// --- large scopes: many thread blocks for each ---------------------------------------------------
//
// Digits of 12 bits from the top: of floats, the exponent and 3 or 4 bits more. The keys with the first
// digit of the cut are collected during the second pass if they fit a buffer; later passes then read only
// them. The last thread block of a pass settles its digit.
//
// A large single source is bracketed first: two ranks of a sample are borders between which the cut
// lies but once in many thousand calls, and one pass over all keys counts those above and at the
// borders and collects those between, of which only as many can be as the sample lets through, whatever
// repeats. Where that fails the passes over all keys follow as without it.

#define DIGIT 12
#define BINS (1 << DIGIT)
#define COPIES 2  // histograms beside each other, so that lanes with one digit seldom meet
#define TILE_KEYS 16
#define TILE (THREADS * TILE_KEYS)
#define PASSES ((KEY_BITS + DIGIT - 1) / DIGIT)
#define DEVIATIONS 4.0  // of the rank of a border in the sample

struct Search {
    u64 prefix, need, collected;
    u64 above, high_ties, low_ties;  // keys above the higher border, at it, and at the lower one
    int collecting;                  // keys with the first digit, during the second pass
    int gathered;                    // the buffer holds all keys between the borders, and their positions after them
    int settled;                     // the key is known
    int done;                        // and all blocks with it are kept
    u32 finished;                    // thread blocks of this launch that are
};

__device__ inline int digit_shift(int pass) {
    int shift = KEY_BITS - DIGIT * (pass + 1);
    return shift > 0 ? shift : 0;
}

__device__ inline int digit_width(int pass) { return pass < PASSES - 1 ? DIGIT : KEY_BITS - DIGIT * (PASSES - 1); }

// Searches: one for each scope, then two in its sample (from `samples` > 0 on), for the higher and the lower border.
extern "C" __global__ void large_start(
    const __grid_constant__ Numbers keep, i64 low, i64 blocks, i64 s0, i64 scopes, i64 samples, Search* searches, Cutoff* cutoffs
) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= scopes) return;
    Search empty = {};
    Search &search = searches[i], *borders = searches + scopes + 2 * i;
    u64 need = wanted(keep, s0 + i, low, blocks);
    search = empty;
    search.need = need;
    search.done = search.settled = need == 0;
    if (need == 0) cutoffs[s0 + i] = {LARGEST_KEY, -1};
    if (samples == 0) return;
    double share = (double)need / (double)blocks, rank = share * (double)samples;
    double spread = DEVIATIONS * sqrt(rank * (1.0 - share)) + DEVIATIONS;
    double higher = floor(rank - spread), lower = ceil(rank + spread);
    borders[0] = borders[1] = empty;
    borders[0].need = higher < 1.0 ? 0 : (u64)higher;
    borders[1].need = lower > (double)samples ? 0 : (u64)lower;
    if (higher < 1.0) borders[0].prefix = LARGEST_KEY, borders[0].settled = 1;
    if (lower > (double)samples) borders[1].prefix = 0, borders[1].settled = 1;
}

// One key of each of `samples` stretches, from a place that no period of the data meets.
extern "C" __global__ void large_sample(Sources sources, i64 s0, i64 samples, Key* buffer, i64 capacity) {
    const Source& source = sources.first;
    const char* base = source.leaf.data + scope_offset(source.leaf, s0 + blockIdx.y);
    i64 stretch = source.blocks / samples;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < samples; i += (i64)gridDim.x * THREADS) {
        u64 mixed = (u64)(i + 1) * 0x9E3779B97F4A7C15ULL;
        mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9ULL;
        i64 at = i * stretch + (i64)((mixed >> 32) * (u64)stretch >> 32);
        buffer[blockIdx.y * capacity + i] = key_at(base + block_offset(source.leaf, at), dtype_of(source.leaf), sources.kind);
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
        sum += counts[k] = __ldcg(histogram + (from_top ? BINS - 1 - b : b));
    }
    u64 before = wide_before(sum);
    for (int k = 0; k < each; k++) {
        int b = threadIdx.x * each + k;
        if (before < need && need <= before + counts[k])
            *bin = from_top ? BINS - 1 - b : b, *left = need - before, *inside = counts[k];
        before += counts[k];
    }
    for (int b = threadIdx.x; b < BINS; b += THREADS) histogram[b] = 0;
    __syncthreads();
}

// Whether this is the last of `blocks` thread blocks that came here; what the others wrote is then seen.
__device__ inline bool is_last(Search& search, u32 blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&search.finished, 1u) == blocks - 1;
        if (last) search.finished = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// Counts the digits of one source's keys; thread blocks of row y work on search y. With `samples`, searches for borders.
extern "C" __global__ void __launch_bounds__(THREADS, 4) large_histogram(
    Sources sources, i64 s0, i64 positions, int pass, Search* searches, u64* histograms, Key* buffer, i64 capacity,
    int first_source, int last_source, i64 samples, Cutoff* cutoffs
) {
    __shared__ u32 bins[COPIES * BINS];
    __shared__ u64 place_in_buffer, bin, left, inside;
    Search& search = searches[blockIdx.y];
    if (search.settled) return;
    bool from_buffer = samples || search.gathered || (pass > 1 && search.collecting);
    bool collects = pass == 1 && search.collecting && !from_buffer;
    if (from_buffer && !first_source) return;
    i64 blocks = samples ? samples : from_buffer ? (i64)search.collected : sources.first.blocks;
    i64 tiles = (blocks + TILE - 1) / TILE, working = tiles < (i64)gridDim.x ? tiles : (i64)gridDim.x;
    if (working < 1) working = 1;
    if (blockIdx.x >= working) return;
    i64 scope = samples ? blockIdx.y / 2 : blockIdx.y;
    Key* kept = buffer + scope * capacity;
    const Source& source = sources.first;
    const char* base = source.leaf.data + scope_offset(source.leaf, s0 + scope);
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
                load_keys(sources, base, 0, at, blocks, keys + v * VECTOR);
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
    u64* histogram = histograms + (i64)blockIdx.y * BINS;
    for (int b = t; b < BINS; b += THREADS) {
        u32 count = 0;
        for (int c = 0; c < COPIES; c++) count += bins[c * BINS + b];
        if (count) atomicAdd(histogram + b, (u64)count);
    }
    if (!is_last(search, (u32)working) || !(from_buffer || last_source)) return;
    find_bin(histogram, true, search.need, &bin, &left, &inside);
    if (t) return;
    search.prefix = search.prefix << digit_width(pass) | bin;
    search.need = left;
    if (pass == 0 && !from_buffer) search.collecting = inside <= (u64)capacity;
    if (pass == PASSES - 1) {
        search.settled = 1;
        search.done = left == inside;
        if (!samples) cutoffs[s0 + scope] = {search.prefix, positions};
    }
}

#define SPARE 1024  // keys that a thread block may hold before a tile
#define POSITIONED (KEY_BITS == 32)  // of wider keys, positions would not fit beside them in shared memory

// Counts keys above and at the borders of a scope, and collects those between; decides what is left to do.
extern "C" __global__ void __launch_bounds__(THREADS, 4) large_gather(
    Sources sources, i64 s0, i64 scopes, Search* searches, Key* buffer, i64 capacity, Cutoff* cutoffs
) {
    __shared__ Key stage[SPARE + TILE];
#if POSITIONED
    __shared__ u32 stage_positions[SPARE + TILE];
#endif
    __shared__ u32 staged;
    __shared__ u64 place_in_buffer;
    Search& search = searches[blockIdx.y];
    if (search.settled) return;
    const Search* borders = searches + scopes + 2 * blockIdx.y;
    const Source& source = sources.first;
    Key high = (Key)borders[0].prefix, low = (Key)borders[1].prefix, *kept = buffer + (i64)blockIdx.y * capacity;
#if POSITIONED
    u32* positions = (u32*)(buffer + (i64)gridDim.y * capacity) + (i64)blockIdx.y * capacity;
#endif
    i64 blocks = source.blocks;
    const char* base = source.leaf.data + scope_offset(source.leaf, s0 + blockIdx.y);
    u32 above = 0, high_ties = 0, low_ties = 0;  // of a thread: fewer than 2^32
    int t = threadIdx.x;
    if (t == 0) staged = 0;
    __syncthreads();
    auto flush = [&] {
        u32 count = staged;
        if (t == 0) place_in_buffer = count ? atomicAdd(&search.collected, (u64)count) : 0;
        __syncthreads();
        for (u32 i = t; i < count; i += THREADS) {
            if (place_in_buffer + i >= (u64)capacity) continue;
            kept[place_in_buffer + i] = stage[i];
#if POSITIONED
            positions[place_in_buffer + i] = stage_positions[i];
#endif
        }
        __syncthreads();
        if (t == 0) staged = 0;
        __syncthreads();
    };
    for (i64 tile = (i64)blockIdx.x * TILE; tile < blocks; tile += (i64)gridDim.x * TILE) {
        Key keys[TILE_KEYS];
        bool full = false;
#pragma unroll
        for (int v = 0; v < TILE_KEYS / VECTOR; v++) {
            i64 at = tile + (i64)(v * THREADS + t) * VECTOR;
#if DENSE
            load_keys(sources, base, 0, at, blocks, keys + v * VECTOR);
#else
            keys[v] = at < blocks ? key_at(base + block_offset(source.leaf, at), dtype_of(source.leaf), sources.kind) : 0;
#endif
        }
#pragma unroll
        for (int k = 0; k < TILE_KEYS; k++) {
            Key key = keys[k];
            above += key > high;
            if (key > high || key < low) continue;
            i64 at = tile + (i64)(k / VECTOR * THREADS + t) * VECTOR + k % VECTOR;
            if (at >= blocks) continue;
            if (key == high) {
                high_ties++;
            } else if (key == low) {
                low_ties++;
            } else {
                u32 place = atomicAdd(&staged, 1u);
                stage[place] = key;
#if POSITIONED
                stage_positions[place] = (u32)at;
#endif
                full = full || place >= SPARE;
            }
        }
        if (__syncthreads_or(full)) flush();
    }
    __syncthreads();
    flush();
    u32 total;
    block_before(above, total);
    if (t == 0 && total) atomicAdd(&search.above, (u64)total);
    block_before(high_ties, total);
    if (t == 0 && total) atomicAdd(&search.high_ties, (u64)total);
    block_before(low_ties, total);
    if (t == 0 && total) atomicAdd(&search.low_ties, (u64)total);
    if (!is_last(search, gridDim.x) || t) return;
    u64 need = search.need, higher = __ldcg(&search.above), at_high = __ldcg(&search.high_ties), at_low = __ldcg(&search.low_ties);
    u64 between = __ldcg(&search.collected), through = higher + at_high + between;
    bool by_high = need > higher && need <= higher + at_high, by_low = need > through && need <= through + at_low;
    if (by_high || by_low) {
        search.settled = 1;
        search.prefix = by_high ? high : low;
        search.need = need - (by_high ? higher : through);
        search.done = search.need == (by_high ? at_high : at_low);
        cutoffs[s0 + blockIdx.y] = {search.prefix, blocks};
    } else if (need > higher && need <= through && between <= (u64)capacity) {
        search.gathered = 1;
        search.need = need - higher - at_high;
    } else {
        search.collected = 0;
    }
}

// Where not all ties are kept: how many lie in each of BINS stretches of positions.
extern "C" __global__ void large_ties(
    Sources sources, i64 s0, i64 blocks, Search* searches, u64* histograms, const Key* buffer, i64 capacity
) {
    Search& search = searches[blockIdx.y];
    if (search.done) return;
    const Source& source = sources.first;
    i64 s = s0 + blockIdx.y, stretch = (blocks + BINS - 1) / BINS;
#if POSITIONED
    if (search.gathered && blocks >> 32 == 0) {
        const Key* kept = buffer + (i64)blockIdx.y * capacity;
        const u32* positions = (const u32*)(buffer + (i64)gridDim.y * capacity) + (i64)blockIdx.y * capacity;
        i64 step = (i64)gridDim.x * THREADS;
        for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < (i64)search.collected; i += step)
            if (kept[i] == (Key)search.prefix) atomicAdd(histograms + blockIdx.y * BINS + positions[i] / (u32)stretch, 1ULL);
        return;
    }
#endif
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

#define PIECES THREADS

// The position of the last kept tie.
extern "C" __global__ void large_last(Sources sources, i64 s0, Search* searches, u64* histograms, Cutoff* cutoffs) {
    __shared__ u64 bin, left, inside;
    Search& search = searches[blockIdx.x];
    if (search.done) return;
    find_bin(histograms + blockIdx.x * BINS, false, search.need, &bin, &left, &inside);
    i64 s = s0 + blockIdx.x, stretch = (sources.blocks + BINS - 1) / BINS, from = (i64)bin * stretch;
    i64 to = from + stretch < sources.blocks ? from + stretch : sources.blocks, piece = (to - from + PIECES - 1) / PIECES;
    Key key = (Key)search.prefix;
    // First the piece of the stretch in which it lies, all of them counted at once.
    __shared__ u32 counts[PIECES];
    __shared__ i64 begin;
    __shared__ u64 rest;
    for (int p = threadIdx.x / 32; p < PIECES; p += THREADS / 32) {
        i64 stop = from + (p + 1) * piece < to ? from + (p + 1) * piece : to;
        u32 equal = 0;
        for (i64 j = from + p * piece + threadIdx.x % 32; j < stop; j += 32) equal += key_of(sources, s, j) == key;
        equal = warp_sum(equal);
        if (threadIdx.x % 32 == 0) counts[p] = equal;
    }
    __syncthreads();
    u32 mine = counts[threadIdx.x], total, before = block_before(mine, total);
    if (before < left && left <= (u64)before + mine) begin = from + threadIdx.x * piece, rest = left - before;
    __syncthreads();
    i64 end = begin + piece < to ? begin + piece : to;
    find_last([&](i64 j) { return key_of(sources, s, j); }, key, begin, end, rest, &cutoffs[s].last);
}
