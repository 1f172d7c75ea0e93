// Tiles of a matrix with dense rows, and the teams of lanes that own them: 16 bytes of a row each, or all of a short run.

#pragma once

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
