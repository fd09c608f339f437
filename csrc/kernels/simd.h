// A float vector of the unit's instruction set, on GCC/Clang vector types, plus the few operations
// that need an intrinsic. Everything is static: each kernel unit keeps its own copy.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PS_CAT_(a, b) a##b
#define PS_CAT(a, b) PS_CAT_(a, b)
#define PS_NS PS_CAT(isa_, PROSPARSE_ISA)

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define PS_AVX512 1
#if defined(__AVX512BF16__)
#define PS_BF16 1
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PS_AVX2 1
#endif

namespace prosparse {
namespace PS_NS {

#if defined(PS_AVX512)
constexpr int W = 16;
#elif defined(PS_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// f(0), f(1) ... f(N-1) with constants: GCC keeps an array of accumulators in registers only if every index
// is one before its loop optimisers run, which #pragma unroll comes too late for.
template <int I>
struct Constant {
    constexpr operator int() const { return I; }
};
template <int N, class F>
__attribute__((always_inline)) static inline void unroll(const F& f) {
    if constexpr (N > 0) {
        unroll<N - 1>(f);
        f(Constant<N - 1>{});
    }
}

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vfu __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint8_t vbu __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint16_t vhu __attribute__((vector_size(W * 2), aligned(1), may_alias));

static inline vf load(const float* p) { return *(const vfu*)p; }
static inline void store(float* p, vf x) { *(vfu*)p = x; }
static inline vf set1(float x) { return x - vf{}; }
// GCC's __builtin_convertvector widens bytes one at a time, hence the intrinsics.
static inline vi widen(const uint8_t* p) {
#if defined(PS_AVX512)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(PS_AVX2)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    return __builtin_convertvector(*(const vbu*)p, vi);
#endif
}
static inline vi widen(const uint16_t* p) {
#if defined(PS_AVX512)
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(PS_AVX2)
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    return __builtin_convertvector(*(const vhu*)p, vi);
#endif
}

static inline float bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline uint32_t float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
static inline float bf16_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

static inline float half_float(uint16_t h) {
#if defined(PS_AVX512) || defined(PS_AVX2)
    return _cvtsh_ss(h);
#elif defined(__aarch64__)
    __fp16 f;
    memcpy(&f, &h, 2);
    return f;
#else
    uint32_t sign = uint32_t(h & 0x8000) << 16, mag = h & 0x7fff;
    if (mag >= 0x7c00) return bits_float(sign | 0x7f800000 | (mag & 0x3ff) << 13);
    // multiplying by 2^112 re-biases the exponent and normalises subnormals exactly
    return bits_float(sign | float_bits(bits_float(mag << 13) * 0x1p112f));
#endif
}
static inline uint16_t float_half(float f) {
#if defined(PS_AVX512) || defined(PS_AVX2)
    return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    __fp16 h = (__fp16)f;
    uint16_t u;
    memcpy(&u, &h, 2);
    return u;
#else
    uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
    if (mag > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (mag >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (mag < 0x38800000) {  // subnormal half: let the FPU round at the right bit
        float magic = 0x1p-1f + 0.0f;
        float r = bits_float(mag) + magic;
        return uint16_t(sign | (float_bits(r) - float_bits(magic)));
    }
    uint32_t r = mag - 0x38000000;
    r += 0xfff + (r >> 13 & 1);
    return uint16_t(sign | r >> 13);
#endif
}

static inline vf load_half(const uint16_t* p) {
#if defined(PS_AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(PS_AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
    float16x4_t h;
    memcpy(&h, p, 8);
    return (vf)vcvt_f32_f16(h);
#else
    vf r;
    for (int i = 0; i < W; i++) r[i] = half_float(p[i]);
    return r;
#endif
}
static inline vf load_bf16(const uint16_t* p) { return (vf)(widen(p) << 16); }

static inline float sum(vf x) {
#if defined(PS_AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(PS_AVX2)
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}
// The sums of W vectors, each added up in the order of `sum`, so that rows computed side by side and rows by
// themselves agree bit for bit.
static inline vf sums_of(const vf (&v)[W]) {
#if defined(PS_AVX512)
    __m512 a[8], b[4], c[2];
    unroll<8>([&](auto i) {
        const __m512 p = (__m512)v[i], q = (__m512)v[i + 8];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
    });
    unroll<4>([&](auto i) {
        const __m512 p = a[i], q = a[i + 4];
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
    });
    // each lane of 128 bits holds one row's sums: of row i, i + 8, i + 4 and i + 12
    unroll<2>([&](auto i) {
        const __m512d p = _mm512_castps_pd(b[i]), q = _mm512_castps_pd(b[i + 2]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    });
    const __m512 d = _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
    const __m512i in_order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (vf)_mm512_permutexvar_ps(in_order, d);
#elif defined(PS_AVX2)
    __m256 a[4], b[2];
    unroll<4>([&](auto i) {
        const __m256 p = (__m256)v[i], q = (__m256)v[i + 4];
        a[i] = _mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
    });
    // each lane of 128 bits holds one row's sums: of row i and i + 4
    unroll<2>([&](auto i) {
        const __m256d p = _mm256_castps_pd(a[i]), q = _mm256_castps_pd(a[i + 2]);
        b[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)),
                             _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
    });
    const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(b[0], b[1], 0x88), _mm256_shuffle_ps(b[0], b[1], 0xdd));
    return (vf)_mm256_permutevar8x32_ps(c, _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7));
#else
    vf r;
    for (int i = 0; i < W; i++) r[i] = sum(v[i]);
    return r;
#endif
}
static inline vf max(vf a, vf b) { return a > b ? a : b; }

// Cephes-style e^x: |error| < 2 ulp on [-87, 88], saturating outside.
static inline vf exp(vf x) {
    x = x < -87.0f ? set1(-87.0f) : x;
    x = x > 88.0f ? set1(88.0f) : x;
    const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vf n = (x * 1.44269504f + magic) - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = set1(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi e = __builtin_convertvector(n, vi);
    return p * (vf)((e + 127) << 23);
}

// W unsigned codes of a quantised row from column `col` (a multiple of W).
template <Type T>
static inline vi load_codes(const uint8_t* codes, int cols, int col) {
    if constexpr (T == Type::q8_0) return widen(codes + col);
    const int chunk = col / 64, in = col % 64;
    vi v = widen(codes + chunk * 32 + in % 32);
    v = (in < 32 ? v : v >> 4) & 15;
    if constexpr (T == Type::q5_1) {
        const uint8_t* high = codes + round_up(cols, 64) / 2 + chunk * 8;
        uint64_t bits;
        memcpy(&bits, high, 8);
        vi bit;
        for (int i = 0; i < W; i++) bit[i] = 1 << i;
        v += ((vi{} + int(bits >> in & 0xffff)) & bit) != 0 ? vi{} + 16 : vi{};
    }
    return v;
}

// The same of any type: floats as they are, codes unscaled.
template <Type T>
static inline vf load_raw(const uint8_t* codes, int cols, int col) {
    if constexpr (T == Type::f32)
        return load((const float*)codes + col);
    else if constexpr (T == Type::f16)
        return load_half((const uint16_t*)codes + col);
    else if constexpr (T == Type::bf16)
        return load_bf16((const uint16_t*)codes + col);
    else
        return __builtin_convertvector(load_codes<T>(codes, cols, col), vf);
}

#if defined(PS_AVX512)
// 64 unsigned codes of chunk c, in column order.
template <Type T>
static inline __m512i codes(const uint8_t* row, int chunks, int c) {
    if constexpr (T == Type::q8_0) return _mm512_loadu_si512(row + c * 64);
    __m512i v = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(row + c * 32)));
    const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    v = _mm512_and_si512(_mm512_srlv_epi16(v, shift), _mm512_set1_epi8(15));
    if constexpr (T == Type::q5_1) {
        uint64_t high;
        memcpy(&high, row + chunks * 32 + c * 8, 8);
        v = _mm512_mask_add_epi8(v, high, v, _mm512_set1_epi8(16));
    }
    return v;
}
#endif

#if defined(PS_AVX2)
// 32 unsigned codes of block b, in column order.
template <Type T>
static inline __m256i codes(const uint8_t* row, int chunks, int b) {
    if constexpr (T == Type::q8_0) return _mm256_loadu_si256((const __m256i*)(row + b * 32));
    __m256i v = _mm256_loadu_si256((const __m256i*)(row + b / 2 * 32));
    if (b & 1) v = _mm256_srli_epi16(v, 4);
    v = _mm256_and_si256(v, _mm256_set1_epi8(15));
    if constexpr (T == Type::q5_1) {
        int32_t bits;
        memcpy(&bits, row + chunks * 32 + b * 4, 4);
        const __m256i byte =
            _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
        __m256i h = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
        v = _mm256_or_si256(v, _mm256_and_si256(_mm256_cmpeq_epi8(h, bit), _mm256_set1_epi8(16)));
    }
    return v;
}
#endif

// CALL(T) with the run-time type as a constant.
#define PS_BY_TYPE(type, CALL)                    \
    switch (type) {                               \
        case Type::f32: CALL(Type::f32); break;   \
        case Type::f16: CALL(Type::f16); break;   \
        case Type::bf16: CALL(Type::bf16); break; \
        case Type::q8_0: CALL(Type::q8_0); break; \
        case Type::q5_1: CALL(Type::q5_1); break; \
        case Type::q4_0: CALL(Type::q4_0); break; \
        case Type::q4_1: CALL(Type::q4_1); break; \
    }

}  // namespace PS_NS
}  // namespace prosparse
