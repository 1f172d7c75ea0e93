// Blocks that are tiles of a matrix with dense rows: `rows` runs of RUN adjacent elements, tiles side by side.
//
// Norms are plain float64 sums, good to 2^-42 for up to 1024 elements; the rare block that this does not
// decide is summed again in integers. A tile's row is read by TEAM lanes, 16 bytes each (or all of a shorter run).

#include "tiles.cuh"

enum Order { ONE, TWO, LARGEST };

// Adds an element to a sum, or takes the maximum; NaN stays.
__device__ inline void add(Stored x, int order, double& sum) {
    double size = magnitude_at((const char*)&x, ELEMENT);
    if (order == LARGEST)
        sum = size > sum || size != size ? size : sum;
    else
        sum = order == TWO ? fma(size, size, sum) : sum + size;
}

__device__ inline void add(const Vector& x, int order, double& sum) {
#pragma unroll
    for (int u = 0; u < VECTOR; u++) add(x.parts[u], order, sum);
}

__device__ inline double joined(double sum, double other, int order) {
    if (order == LARGEST) return other > sum || other != other ? other : sum;
    return sum + other;
}

// `below` or the next float32, whichever is nearer to the exact norm. A call, because it is rare and long.
__device__ __noinline__ u32 settled_tile(const Stored* tile, int rows, i64 pitch, bool square, u32 below) {
    i64 limbs[LIMBS];
    for (int i = 0; i < LIMBS; i++) limbs[i] = 0;
    limbs_add<false>(limbs, midpoint_above(below), square, -1);
    for (int r = 0; r < rows; r++)
        for (int e = 0; e < RUN; e++)
            limbs_add<false>(limbs, magnitude_at((const char*)(tile + r * pitch + e), ELEMENT), square, 1);
    return settled(below, limbs_sign(limbs));
}

// The float32 bits of a tile's norm from its sum (or maximum); `wide` is the same in float64.
__device__ inline u32 finished(const Stored* tile, const Matrix& m, int order, double sum, double& wide) {
    wide = sum;
    if (order == LARGEST || !isfinite(sum)) return narrowed(sum);
    bool sure;
    u32 below = rounded_sum(sum, order == TWO, wide, sure);
    return sure ? below : settled_tile(tile, m.rows, m.pitch, order == TWO, below);
}

// Adds COUNT rows from `r` on while there are as many; all are loaded before the first is used.
template <int COUNT>
__device__ inline void add_rows(const Stored* at, const Matrix& m, int order, int& r, double& sum) {
    for (; r + COUNT <= m.rows; r += COUNT) {
        Vector v[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++) v[k].raw = *(const RawVector*)(at + (r + k) * m.pitch);
#pragma unroll
        for (int k = 0; k < COUNT; k++) add(v[k], order, sum);
    }
}

// A team's part in a tile's sum.
__device__ inline double member_sum(const Stored* tile, const Matrix& m, int member, int order) {
    double sum = 0.0;
    int r = 0;
    if (TEAM > 1) add_rows<8>(tile + member * VECTOR, m, order, r, sum);  // small tiles want the registers
    add_rows<4>(tile + member * VECTOR, m, order, r, sum);
    add_rows<1>(tile + member * VECTOR, m, order, r, sum);
    return sum;
}

__device__ inline double team_sum(double sum, int order) {
#pragma unroll
    for (int d = TEAM / 2; d; d >>= 1) sum = joined(sum, __shfl_xor_sync(FULL, sum, d), order);
    return sum;
}

// Norm of every tile, in row-major order. A team of lanes owns a tile.
extern "C" __global__ void tile_norms(const Stored* x, Matrix m, int order, u32* out) {
    int member = threadIdx.x % TEAM;
    i64 teams = (i64)gridDim.x * blockDim.x / TEAM, first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / TEAM;
    i64 rounds = (m.tiles + teams - 1) / teams;  // all lanes of a warp take as many
    for (i64 round = 0; round < rounds; round++) {
        i64 tile = round * teams + first;
        bool there = tile < m.tiles;
        const Stored* at = tile_at(x, m, there ? tile : 0);
        double sum = team_sum(member_sum(at, m, member, order), order), wide;
        if (there && member == 0) out[tile] = finished(at, m, order, sum, wide);
    }
}

#define TILES 4  // that a team works on at once, so that its members share what is done for each

// The same for tiles of one row. A team of lanes owns TILES tiles.
extern "C" __global__ void run_norms(const Stored* x, Matrix m, int order, u32* out) {
    int member = threadIdx.x % TEAM;
    i64 teams = (i64)gridDim.x * blockDim.x / TEAM, first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / TEAM;
    i64 rounds = (m.tiles + teams * TILES - 1) / (teams * TILES);
    for (i64 round = 0; round < rounds; round++) {
        const Stored* at[TILES];
        Vector v[TILES];
        double sums[TILES];
        i64 tile = round * TILES * teams + first;
#pragma unroll
        for (int k = 0; k < TILES; k++) {
            bool there = tile + k * teams < m.tiles;
            at[k] = tile_at(x, m, there ? tile + k * teams : 0);
            v[k].raw = *(const RawVector*)(at[k] + member * VECTOR);
        }
#pragma unroll
        for (int k = 0; k < TILES; k++) {
            sums[k] = 0.0;
            add(v[k], order, sums[k]);
            sums[k] = team_sum(sums[k], order);
        }
        // Member k finishes tile k, then tile k + TEAM.
#pragma unroll
        for (int k = 0; k < TILES; k += TEAM) {
            const Stored* own = at[k];
            double sum = sums[k];
#pragma unroll
            for (int i = 1; i < TEAM && k + i < TILES; i++)
                if (member == i) own = at[k + i], sum = sums[k + i];
            i64 mine = tile + (k + member) * teams;
            double wide;
            if (k + member < TILES && mine < m.tiles) out[mine] = finished(own, m, order, sum, wide);
        }
    }
}

// The proximal step of every tile of `from`, into `to`, which may be `from`. A team of lanes owns a tile.
extern "C" __global__ void shrink_tiles(
    const Stored* from, Matrix m, const __grid_constant__ Numbers thresholds, i64 blocks, i64 scopes, Stored* to, Matrix written
) {
    int member = threadIdx.x % TEAM;
    i64 teams = (i64)gridDim.x * blockDim.x / TEAM, first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / TEAM;
    i64 rounds = (m.tiles + teams - 1) / teams;
    for (i64 round = 0; round < rounds; round++) {
        i64 tile = round * teams + first, s = 0, j = 0;
        bool there = tile < m.tiles;
        if (!there) tile = 0;
        const Stored* at = tile_at(from, m, tile);
        double sum = team_sum(member_sum(at, m, member, TWO), TWO), wide;
        if (!thresholds.constant) split(tile, blocks, scopes, s, j);
        double norm = widened(finished(at, m, TWO, sum, wide));
        double factor = shrink_factor(norm, wide, in_norm_dtype(number_at(thresholds, s, j), true));
        __syncwarp();  // a tile may have been read again to settle its norm
        if (!there || (factor == 1.0 && from == to)) continue;
        Stored* into = (Stored*)tile_at(to, written, tile);
#pragma unroll 4
        for (int r = 0; r < m.rows; r++) {
            Vector v;
            v.raw = *(const RawVector*)(at + r * m.pitch + member * VECTOR);
#pragma unroll
            for (int u = 0; u < VECTOR; u++) scale_at((char*)(v.parts + u), ELEMENT, factor);
            *(RawVector*)(into + r * written.pitch + member * VECTOR) = v.raw;
        }
    }
}

#if RUN < 4 || (RUN < 8 && ELEMENT != FLOAT32)
// Norms of tiles with rows of less than 16 bytes: a thread owns the neighbours that 16 bytes hold.
#define WIDE (16 / (int)sizeof(Stored))
union WideVector {
    uint4 raw;
    Stored parts[WIDE];
};

extern "C" __global__ void narrow_norms(const Stored* x, Matrix m, int order, u32* out) {
    constexpr int tiles = WIDE / RUN;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < m.tiles / tiles; i += (i64)gridDim.x * blockDim.x) {
        const Stored* at = tile_at(x, m, i * tiles);
        double sums[tiles];
#pragma unroll
        for (int k = 0; k < tiles; k++) sums[k] = 0.0;
#pragma unroll 4
        for (int r = 0; r < m.rows; r++) {
            WideVector v;
            v.raw = *(const uint4*)(at + r * m.pitch);
#pragma unroll
            for (int u = 0; u < WIDE; u++) add(v.parts[u], order, sums[u / RUN]);
        }
        double wide;
#pragma unroll
        for (int k = 0; k < tiles; k++) out[i * tiles + k] = finished(at + k * RUN, m, order, sums[k], wide);
    }
}
#endif

// +0.0 into the dropped tiles. A thread owns 32 bytes of a row, so that no sector of memory is written in part.
#define PIECE (32 / (int)sizeof(Stored))

extern "C" __global__ void drop_tiles(Stored* x, Matrix m, const __grid_constant__ Decision decision, i64 blocks, i64 scopes) {
    i64 pieces = m.columns * RUN / PIECE, total = m.tiles / m.columns * m.rows * pieces;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (i64)gridDim.x * blockDim.x) {
        i64 row, piece, r, inside;
        split(i, pieces, 2, row, piece);
        split(row, m.rows, 2, r, inside);
        Stored* at = x + row * m.pitch + piece * PIECE;
        constexpr int tiles = RUN < PIECE ? PIECE / RUN : 1, width = PIECE / tiles;
        int verdicts[tiles], all = 0, kept = 0;
#pragma unroll
        for (int k = 0; k < tiles; k++) {
            i64 s, j;
            split(r * m.columns + piece * PIECE / RUN + k, blocks, scopes, s, j);
            verdicts[k] = decide(decision, s, j);
            kept += verdicts[k] == KEEP;
            all += verdicts[k] == DROP;
        }
        if (kept == tiles) continue;
        uint4* vectors = (uint4*)at;
        if (all == tiles) {
            vectors[0] = vectors[1] = make_uint4(0, 0, 0, 0);
            continue;
        }
        union {
            uint4 raw[2];
            Stored parts[PIECE];
        } y;
        y.raw[0] = vectors[0];
        y.raw[1] = vectors[1];
#pragma unroll
        for (int u = 0; u < PIECE; u++) {
            int verdict = verdicts[u / width];
            if (verdict == DROP) write_zero((char*)(y.parts + u), ELEMENT);
            if (verdict == SPOIL) write_nan((char*)(y.parts + u), ELEMENT);
        }
        vectors[0] = y.raw[0];
        vectors[1] = y.raw[1];
    }
}
