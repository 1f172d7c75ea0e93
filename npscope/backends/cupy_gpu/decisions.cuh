// Which blocks stay: by rank, by a threshold on the norm, or by a mask.

#pragma once

#include "elements.cuh"

struct Cutoff {
    u64 key;
    i64 last;
};

enum Rule { BY_RANK, BY_THRESHOLD, BY_MASK };

enum Verdict { DROP, KEEP, SPOIL };  // a threshold on the device that is NaN spoils its block

struct Decision {
    int rule, kind;
    int narrow;  // norms are float32
    i64 start;   // the first block's position in its scope
    const Cutoff* cutoffs;
    Numbers numbers;
    Leaf leaf;  // one number for each block: its norm, or its only element
};

__device__ inline int by_rank(const Cutoff& cutoff, Key key, i64 position) {
    Key border = (Key)cutoff.key;
    return key > border || (key == border && position <= cutoff.last);
}

__device__ inline int by_threshold(double size, bool narrow, double t) {
    if (t != t) return SPOIL;
    return !(in_norm_dtype(size, narrow) < in_norm_dtype(t, narrow));
}

__device__ inline int decide(const Decision& d, i64 s, i64 j) {
    if (d.rule == BY_MASK) return number_at(d.numbers, s, d.start + j) != 0.0;
    const char* at = d.leaf.data + scope_offset(d.leaf, s) + block_offset(d.leaf, j);
    int dtype = d.leaf.dtype;  // not ELEMENT, which is that of the written array
    if (d.rule == BY_RANK) return by_rank(d.cutoffs[s], key_at(at, dtype, d.kind), d.start + j);
    return by_threshold(magnitude_at(at, dtype), d.narrow, number_at(d.numbers, s, d.start + j));
}

// --- values between cuts --------------------------------------------------------------------------

// The k-th value of a dtype whose key this is.
__device__ inline double value_of(const Cutoff& cutoff, int dtype, int kind) {
    u64 held = 0;
    write_key((char*)&held, dtype, (Key)cutoff.key, kind);
    return real_at((const char*)&held, dtype);
}

// The point between two values; equal ends give that end.
__device__ inline double point_between(const Cutoff& upper, const Cutoff& lower, double weight, int dtype, int kind) {
    double a = value_of(upper, dtype, kind), b = value_of(lower, dtype, kind);
    if (a == b || weight == 0.0 || (weight < 0.0 && isinf(a))) return a;
    if (weight > 0.0) return a / (1.0 + weight) + b * (weight / (1.0 + weight));
    return 2.0 * (b / 2.0 + (a / 2.0 - b / 2.0) / (1.0 + weight));  // what is added to b may be twice the largest number
}
