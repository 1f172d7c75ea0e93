// Blocks that are tiles of a matrix with dense rows: `rows` runs of RUN adjacent elements, tiles side by side.
//
// Norms are plain float64 sums, good to 2^-42 for up to 1024 elements; the rare block that this does not
// decide is summed again in integers. A tile's row is read by TEAM lanes, 16 bytes each (or all of a shorter run).

#include "decisions.cuh"
#include "sums.cuh"

#ifndef RUN
#define RUN 4
#endif
#if ELEMENT == FLOAT16 || ELEMENT == BFLOAT16
typedef u16 Stored;
#else
typedef u32 Stored;
#endif
#define FULL 0xFFFFFFFF
#define VECTOR (RUN * (int)sizeof(Stored) < 16 ? RUN : 16 / (int)sizeof(Stored))
#define TEAM (RUN / VECTOR)

enum Order { ONE, TWO, LARGEST };

template <int BYTES> struct Raw;
template <> struct Raw<16> { typedef uint4 type; };
template <> struct Raw<8> { typedef uint2 type; };
template <> struct Raw<4> { typedef u32 type; };
template <> struct Raw<2> { typedef u16 type; };
typedef Raw<VECTOR * sizeof(Stored)>::type RawVector;

union Vector {
    RawVector raw;
    Stored parts[VECTOR];
};

// A matrix of tiles: tiles (r, c) with c < columns; `pitch` elements from row to row.
struct Matrix {
    i64 tiles, columns, pitch;
    int rows;
};

__device__ inline const Stored* tile_at(const Stored* x, const Matrix& m, i64 tile) {
    i64 r, c;
    split(tile, m.columns, 2, r, c);
    return x + r * m.rows * m.pitch + c * RUN;
}

__device__ inline void add(const Vector& x, int order, double& sum, double& top) {
#pragma unroll
    for (int u = 0; u < VECTOR; u++) {
        double size = magnitude_at((const char*)(x.parts + u), ELEMENT);
        if (order == LARGEST)
            top = size > top || size != size ? size : top;
        else
            sum += order == TWO ? size * size : size;
    }
}

// The float32 bits of a tile's norm from its sum (or maximum); `wide` is the same in float64.
__device__ inline u32 finished(const Stored* tile, const Matrix& m, int order, double sum, double top, double& wide) {
    if (order == LARGEST || !isfinite(sum)) {
        wide = order == LARGEST ? top : sum;
        return narrowed(wide);
    }
    bool sure;
    u32 below = rounded_sum(sum, order == TWO, wide, sure);
    if (sure) return below;
    i64 limbs[LIMBS];
    for (int i = 0; i < LIMBS; i++) limbs[i] = 0;
    limbs_add<false>(limbs, midpoint_above(below), order == TWO, -1);
    for (int r = 0; r < m.rows; r++)
        for (int e = 0; e < RUN; e++)
            limbs_add<false>(limbs, magnitude_at((const char*)(tile + r * m.pitch + e), ELEMENT), order == TWO, 1);
    return settled(below, limbs_sign(limbs));
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
        double sum = 0.0, top = 0.0;
        if (there) {
#pragma unroll 4
            for (int r = 0; r < m.rows; r++) {
                Vector v;
                v.raw = *(const RawVector*)(at + r * m.pitch + member * VECTOR);
                add(v, order, sum, top);
            }
        }
#pragma unroll
        for (int d = TEAM / 2; d; d >>= 1) {
            sum += __shfl_xor_sync(FULL, sum, d);
            double other = __shfl_xor_sync(FULL, top, d);
            top = other > top || other != other ? other : top;
        }
        double wide;
        if (there && member == 0) out[tile] = finished(at, m, order, sum, top, wide);
    }
}

#if RUN == 1
// Norm of every tile that is a column of `rows` elements: a thread owns WIDE neighbours.
#define WIDE (16 / (int)sizeof(Stored))
union WideVector {
    uint4 raw;
    Stored parts[WIDE];
};

extern "C" __global__ void column_norms(const Stored* x, Matrix m, int order, u32* out) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < m.tiles / WIDE; i += (i64)gridDim.x * blockDim.x) {
        const Stored* at = tile_at(x, m, i * WIDE);
        double sums[WIDE], tops[WIDE];
#pragma unroll
        for (int u = 0; u < WIDE; u++) sums[u] = tops[u] = 0.0;
#pragma unroll 4
        for (int r = 0; r < m.rows; r++) {
            WideVector v;
            v.raw = *(const uint4*)(at + r * m.pitch);
#pragma unroll
            for (int u = 0; u < WIDE; u++) {
                Vector one;
                one.parts[0] = v.parts[u];
                add(one, order, sums[u], tops[u]);
            }
        }
        double wide;
#pragma unroll
        for (int u = 0; u < WIDE; u++) out[i * WIDE + u] = finished(at + u, m, order, sums[u], tops[u], wide);
    }
}
#endif

// +0.0 into the dropped tiles. A thread owns 32 bytes of a row, so that no sector of memory is written in part.
#define PIECE (32 / (int)sizeof(Stored))

extern "C" __global__ void drop_tiles(Stored* x, Matrix m, Decision decision, i64 blocks, i64 scopes) {
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
