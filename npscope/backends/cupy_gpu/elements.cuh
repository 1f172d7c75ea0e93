// Elements in device memory: where they lie, what number they are, how they rank.
//
// A leaf is an array cut into scopes, blocks and elements: three loop nests with steps in bytes.
// The dtype is a number in the leaf; a module compiled with -DELEMENT=... knows it beforehand.
//
// CuPy compiles with flush-to-zero for float32, which would lose subnormals: float32 numbers are
// therefore only moved, or converted by instructions that do not flush; arithmetic is in float64.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Dtypes; macros, because the preprocessor compares them.
#define FLOAT32 0
#define FLOAT64 1
#define FLOAT16 2
#define BFLOAT16 3
#define COMPLEX64 4
#define COMPLEX128 5
#define INT8 6
#define INT16 7
#define INT32 8
#define INT64 9
#define UINT8 10
#define UINT16 11
#define UINT32 12
#define UINT64 13
#define BOOL 14
#define ANY 15

#ifndef ELEMENT
#define ELEMENT ANY
#endif

#define LEAST_METRIC 1e-150  // entries of a diagonal metric outside these spoil their block
#define LARGEST_METRIC 1e150

#ifndef MAX_LOOPS
#define MAX_LOOPS 40  // loops of length 1 are left out, and no memory holds an array of 2^40 elements
#endif

struct Loop {
    i64 size, step;
};

struct Leaf {
    char* data;
    i64 elements;  // of a block
    int dtype;
    int scope_rank, block_rank, element_rank;
    Loop loops[MAX_LOOPS];  // over scopes, blocks of a scope, elements of a block; outermost first
};

// Leaves that are worked off together: the first by value, more of them in a table.
struct Leaves {
    int count;
    const Leaf* more;
    Leaf first;

    __device__ const Leaf& operator[](int i) const { return i ? more[i - 1] : first; }
};

// Numbers over scopes or blocks: in memory, or one for all.
struct Numbers {
    int constant;
    double value;
    Leaf leaf;
};

__device__ inline int dtype_of(const Leaf& leaf) { return ELEMENT == ANY ? leaf.dtype : ELEMENT; }

// --- addresses ----------------------------------------------------------------------------------

__device__ inline i64 place(const Loop* loops, int rank, i64 index) {
    i64 offset = 0;
    for (int d = rank - 1; d > 0; d--) {
        i64 size = loops[d].size, outer;
        if ((u64)(index | size) >> 32)
            outer = index / size;
        else
            outer = (u32)index / (u32)size;
        offset += (index - outer * size) * loops[d].step;
        index = outer;
    }
    return rank ? offset + index * loops[0].step : 0;
}

__device__ inline i64 scope_offset(const Leaf& leaf, i64 s) { return place(leaf.loops, leaf.scope_rank, s); }

__device__ inline i64 block_offset(const Leaf& leaf, i64 j) {
    return place(leaf.loops + leaf.scope_rank, leaf.block_rank, j);
}

__device__ inline i64 element_offset(const Leaf& leaf, i64 e) {
    return place(leaf.loops + leaf.scope_rank + leaf.block_rank, leaf.element_rank, e);
}

// Splits a flat index over (scope, block) into the two.
__device__ inline void split(i64 i, i64 blocks, i64 scopes, i64& s, i64& j) {
    if (scopes == 1) {
        s = 0;
    } else if ((u64)(i | blocks) >> 32) {
        s = i / blocks;
    } else {
        s = (u32)i / (u32)blocks;
    }
    j = i - s * blocks;
}

// --- conversions that keep subnormals -----------------------------------------------------------

__device__ inline double widened(u32 bits) {
#ifdef NPSCOPE_EMULATED
    return (double)__uint_as_float(bits);
#else
    double wide;
    asm("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(__uint_as_float(bits)));
    return wide;
#endif
}

// The bits of the float32 nearest to x, ties to even.
__device__ inline u32 narrowed(double x) {
#ifdef NPSCOPE_EMULATED
    return __float_as_uint((float)x);
#else
    float narrow;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(narrow) : "d"(x));
    return __float_as_uint(narrow);
#endif
}

// A number as the norm's dtype holds it.
__device__ inline double in_norm_dtype(double x, bool narrow) { return narrow ? widened(narrowed(x)) : x; }

__device__ inline u32 bits_of_half(u16 half) {
#ifdef NPSCOPE_EMULATED
    u32 size = half & 0x7FFF, sign = (u32)(half & 0x8000) << 16;
    if (size >= 0x7C00) return sign | 0x7F800000 | (size << 13);
    if (size >= 0x0400) return sign | ((size << 13) + (112u << 23));
    return sign | narrowed((double)size * 5.9604644775390625e-8);  // 2^-24
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return __float_as_uint(x);
#endif
}

__device__ inline u32 bits_of_bfloat(u16 bfloat) { return (u32)bfloat << 16; }

// float32 bits to 16 bits, ties to even.
__device__ inline u16 half_of(u32 bits) {
    u32 size = bits & 0x7FFFFFFF;
    u16 sign = (bits >> 16) & 0x8000;
    if (size > 0x7F800000) return sign | 0x7E00;
    if (size >= 0x477FF000) return sign | 0x7C00;  // 65520 and above
    if (size < 0x38800000) {  // subnormal: in units of 2^-24, rounded as float64 rounds to integers
        return sign | (u16)(widened(size) * 16777216.0 + 6755399441055744.0 - 6755399441055744.0);
    }
    u32 odd = (size >> 13) & 1;
    return sign | (u16)((size - 0x38000000 + 0xFFF + odd) >> 13);
}

__device__ inline u16 bfloat_of(u32 bits) {
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (u16)((bits >> 16) | 0x0040);
    return (u16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// float64 to 16 bits goes through float32, as everywhere in npscope.
// A float beside x, its last bit set where x is none: rounded once more, to fewer bits, it gives what x would.
__device__ inline u32 narrowed_to_odd(double x) {
    u32 near = narrowed(x);
    double size = fabs(widened(near));
    if ((near & 1) != 0 || !(size != fabs(x)) || x != x) return near;
    return size < fabs(x) ? near + 1 : near - 1;
}

__device__ inline u16 half_of_double(double x) { return half_of(narrowed_to_odd(x)); }
__device__ inline u16 bfloat_of_double(double x) { return bfloat_of(narrowed_to_odd(x)); }

// --- numbers ------------------------------------------------------------------------------------

__device__ inline double real_at(const char* at, int dtype) {
    switch (dtype) {
        case FLOAT32: return widened(*(const u32*)at);
        case FLOAT64: return *(const double*)at;
        case FLOAT16: return widened(bits_of_half(*(const u16*)at));
        case BFLOAT16: return widened(bits_of_bfloat(*(const u16*)at));
        case INT8: return (double)*(const signed char*)at;
        case INT16: return (double)*(const short*)at;
        case INT32: return (double)*(const int*)at;
        case INT64: return (double)*(const i64*)at;
        case UINT8: case BOOL: return (double)*(const u8*)at;
        case UINT16: return (double)*(const u16*)at;
        case UINT32: return (double)*(const u32*)at;
        case UINT64: return (double)*(const u64*)at;
        default: return 0.0;
    }
}

__device__ inline double not_a_number() { return __longlong_as_double(0x7FF8000000000000LL); }

// |x|; NaN if a part is NaN. A call: hypot is long, and seldom needed.
__device__ __noinline__ double complex_magnitude_at(const char* at, int dtype) {
    if (dtype == COMPLEX64) {
        double re = widened(((const u32*)at)[0]), im = widened(((const u32*)at)[1]);
        return re != re || im != im ? not_a_number() : sqrt(re * re + im * im);
    }
    double re = ((const double*)at)[0], im = ((const double*)at)[1];
    return re != re || im != im ? not_a_number() : hypot(re, im);
}

__device__ inline bool is_complex(int dtype) { return dtype == COMPLEX64 || dtype == COMPLEX128; }

__device__ inline double magnitude_at(const char* at, int dtype) {
    return is_complex(dtype) ? complex_magnitude_at(at, dtype) : fabs(real_at(at, dtype));
}

__device__ inline int width_of(int dtype) {
    switch (dtype) {
        case COMPLEX128: return 16;
        case FLOAT64: case COMPLEX64: case INT64: case UINT64: return 8;
        case FLOAT32: case INT32: case UINT32: return 4;
        case FLOAT16: case BFLOAT16: case INT16: case UINT16: return 2;
        default: return 1;
    }
}

__device__ inline void write_zero(char* at, int dtype) {
    switch (width_of(dtype)) {
        case 16: ((u64*)at)[0] = 0; ((u64*)at)[1] = 0; break;
        case 8: *(u64*)at = 0; break;
        case 4: *(u32*)at = 0; break;
        case 2: *(u16*)at = 0; break;
        default: *(u8*)at = 0;
    }
}

// NaN, where the dtype has one.
__device__ inline void write_nan(char* at, int dtype) {
    switch (dtype) {
        case FLOAT32: *(u32*)at = 0x7FC00000; break;
        case FLOAT64: *(double*)at = not_a_number(); break;
        case FLOAT16: *(u16*)at = 0x7E00; break;
        case BFLOAT16: *(u16*)at = 0x7FC0; break;
        case COMPLEX64: ((u32*)at)[0] = ((u32*)at)[1] = 0x7FC00000; break;
        case COMPLEX128: ((double*)at)[0] = ((double*)at)[1] = not_a_number(); break;
        default: break;
    }
}

__device__ inline void write_real(char* at, int dtype, double x) {
    switch (dtype) {
        case FLOAT32: *(u32*)at = narrowed(x); break;
        case FLOAT64: *(double*)at = x; break;
        case FLOAT16: *(u16*)at = half_of_double(x); break;
        case BFLOAT16: *(u16*)at = bfloat_of_double(x); break;
        default: break;
    }
}

// Multiplies by a factor: 0 writes +0.0, 1 keeps the bits.
__device__ inline void scale_at(char* at, int dtype, double factor) {
    if (factor == 1.0) return;
    if (factor == 0.0) {
        write_zero(at, dtype);
    } else if (dtype == COMPLEX64) {
        for (int part = 0; part < 2; part++)
            ((u32*)at)[part] = narrowed(widened(((u32*)at)[part]) * factor);
    } else if (dtype == COMPLEX128) {
        for (int part = 0; part < 2; part++) ((double*)at)[part] *= factor;
    } else {
        write_real(at, dtype, real_at(at, dtype) * factor);
    }
}

// A real number moved by t / h towards zero: +0.0 where h * |x|, rounded to the norm's dtype, is at most t.
__device__ inline void soften_at(char* at, int dtype, double t, double h, bool narrow) {
    double x = real_at(at, dtype);
    t = in_norm_dtype(t, narrow);
    if (!(t >= 0.0) || !(h >= LEAST_METRIC && h <= LARGEST_METRIC)) {
        write_nan(at, dtype);
    } else if (x == x && t != 0.0) {
        if (in_norm_dtype(h * fabs(x), narrow) <= t)
            write_zero(at, dtype);
        else
            write_real(at, dtype, x > 0.0 ? x - t / h : x + t / h);
    }
}

// Functions that unrolled loops would repeat are calls: compiling would take a minute.
__device__ __noinline__ double number_in_memory(const Leaf& leaf, i64 s, i64 j) {
    return real_at(leaf.data + scope_offset(leaf, s) + block_offset(leaf, j), leaf.dtype);
}

// The number of block j of scope s.
__device__ inline double number_at(const Numbers& numbers, i64 s, i64 j) {
    return numbers.constant ? numbers.value : number_in_memory(numbers.leaf, s, j);
}

// --- ordered integers ---------------------------------------------------------------------------
//
// Equal numbers have equal keys, larger ones larger keys; every NaN is the largest key.

#ifndef KEY_BITS
#define KEY_BITS 32
#endif
#if KEY_BITS == 32
typedef u32 Key;
#else
typedef u64 Key;
#endif

#define LARGEST_KEY ((Key)~(Key)0)

enum KeyKind { MAGNITUDE, SIGNED, INTEGER };

// Magnitudes have no sign, so its place serves another digit.
__device__ inline u32 key_of_bits(u32 bits) {
    bits <<= 1;
    return bits > 0xFF000000 ? 0xFFFFFFFF : bits;
}

__device__ inline u64 key_of_double(double x) {
    u64 bits = (u64)__double_as_longlong(x) << 1;
    return bits > 0x7FF0000000000000ULL << 1 ? ~0ULL : bits;
}

__device__ inline u32 signed_key_of_bits(u32 bits) {
    u32 size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return 0xFFFFFFFF;
    if (size == 0) return 0x80000000;
    return bits == size ? bits | 0x80000000 : ~bits;
}

__device__ inline u64 signed_key_of_double(double x) {
    u64 bits = (u64)__double_as_longlong(x), size = bits & 0x7FFFFFFFFFFFFFFFULL;
    if (size > 0x7FF0000000000000ULL) return ~0ULL;
    if (size == 0) return 1ULL << 63;
    return bits == size ? bits | 1ULL << 63 : ~bits;
}

// The bits of a real number of at most 32 bits as float32.
__device__ inline u32 float_bits_at(const char* at, int dtype) {
    switch (dtype) {
        case FLOAT32: return *(const u32*)at;
        case FLOAT16: return bits_of_half(*(const u16*)at);
        case BFLOAT16: return bits_of_bfloat(*(const u16*)at);
        default: return narrowed(magnitude_at(at, dtype));
    }
}

__device__ inline bool is_signed_integer(int dtype) { return dtype >= INT8 && dtype <= INT64; }

__device__ inline u64 signed_integer_key(const char* at, int dtype) {
    switch (dtype) {
        case INT8: return (u64)(i64) * (const signed char*)at ^ 1ULL << 63;
        case INT16: return (u64)(i64) * (const short*)at ^ 1ULL << 63;
        case INT32: return (u64)(i64) * (const int*)at ^ 1ULL << 63;
        case INT64: return (u64) * (const i64*)at ^ 1ULL << 63;
        case UINT8: return *(const u8*)at;
        case UINT16: return *(const u16*)at;
        case UINT32: return *(const u32*)at;
        default: return *(const u64*)at;
    }
}

__device__ inline Key key_at(const char* at, int dtype, int kind) {
#if KEY_BITS == 32
    u32 bits = float_bits_at(at, dtype);
    return kind == SIGNED ? signed_key_of_bits(bits) : key_of_bits(bits);
#else
    if (kind == INTEGER) {
        u64 bits = *(const u64*)at;
        return dtype == INT64 && bits >> 63 ? ~bits + 1 : bits;
    }
    if (kind == SIGNED) {
        return dtype >= INT8 && dtype <= UINT64 ? signed_integer_key(at, dtype) : signed_key_of_double(real_at(at, dtype));
    }
    return key_of_double(magnitude_at(at, dtype));
#endif
}

// The number with this key, written in the dtype of a result; zeros come out as +0.0.
__device__ inline void write_key(char* at, int dtype, Key key, int kind) {
#if KEY_BITS == 32
    u32 bits = kind == MAGNITUDE ? key >> 1 : key >> 31 ? key & 0x7FFFFFFF : ~key;
    if (key == LARGEST_KEY) bits = 0x7FC00000;
    if (dtype == FLOAT16) *(u16*)at = half_of(bits);
    else if (dtype == BFLOAT16) *(u16*)at = bfloat_of(bits);
    else if (dtype == FLOAT64) *(double*)at = widened(bits);
    else *(u32*)at = bits;
#else
    if (kind == INTEGER) {
        *(double*)at = (double)key;
    } else if (dtype >= INT8 && dtype <= UINT64) {
        u64 bits = is_signed_integer(dtype) ? key ^ 1ULL << 63 : key;
        switch (width_of(dtype)) {
            case 8: *(u64*)at = bits; break;
            case 4: *(u32*)at = (u32)bits; break;
            case 2: *(u16*)at = (u16)bits; break;
            default: *(u8*)at = (u8)bits;
        }
    } else {
        u64 bits = kind == MAGNITUDE ? key >> 1 : key >> 63 ? key & 0x7FFFFFFFFFFFFFFFULL : ~key;
        *(double*)at = key == LARGEST_KEY ? not_a_number() : __longlong_as_double((i64)bits);
    }
#endif
}
