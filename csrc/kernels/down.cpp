// y += sum_j x_j * down_row_j over the active neurons of one group of 32 (they share down's scales).
#include "simd.h"
#include "units.h"

namespace prosparse {
namespace PS_NS {

// Rows side by side: four streams in flight hide more latency than one.
template <Type T>
static inline void down_float(const uint8_t* const* rows, const float* x, int n, int width, float* y) {
    int j = 0;
    for (; j + 4 <= n; j += 4) {
        for (int c = 0; c < width; c += W) {
            vf acc = load(y + c);
            for (int k = 0; k < 4; k++) acc += load_raw<T>(rows[j + k], width, c) * x[j + k];
            store(y + c, acc);
        }
    }
    for (; j < n; j++)
        for (int c = 0; c < width; c += W) store(y + c, load(y + c) + load_raw<T>(rows[j], width, c) * x[j]);
}

#if defined(PS_AVX512) || defined(PS_AVX2)
// The group's x as 15-bit integers under one scale; rows padded to a multiple of four by zeros times row n-1.
struct GroupInts {
    int32_t q[kGroup], sum;
    float scale;
    const uint8_t* rows[kGroup];

    GroupInts(const uint8_t* const* r, const float* x, int n) : sum(0) {
        float amax = 0, total = 0;
        for (int j = 0; j < n; j++) {
            amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
            total += x[j];
        }
        const bool finite = total * 0.0f == 0.0f;
        const float inv = amax > 1e-30f && finite ? 127 * 128 / amax : 0.0f;
        scale = finite ? amax / (127 * 128) : NAN;  // NaN and Inf must survive
        for (int j = 0; j < round_up(n, 4); j++) {
            q[j] = j < n && finite ? int32_t(x[j] * inv + (x[j] < 0 ? -0.5f : 0.5f)) : 0;
            sum += q[j];
            rows[j] = r[j < n ? j : n - 1];
        }
    }
};
#endif

#if defined(PS_AVX512)
// Bytes of four rows are interleaved so that one VNNI instruction adds four neurons to each column;
// q = 128 * hi + lo.
template <Type T>
static inline void down_quantized(const uint8_t* const* rows, const float* x, int n, const uint8_t* scales,
                                  int width, float* y) {
    const int chunks = round_up(width, 64) / 64;
    const GroupInts g(rows, x, n);
    alignas(4) int8_t hi[kGroup], lo[kGroup];
    for (int j = 0; j < round_up(n, 4); j++) {
        hi[j] = int8_t((g.q[j] + 64) >> 7);
        lo[j] = int8_t(g.q[j] - hi[j] * 128);
    }
    const uint16_t *ds = (const uint16_t*)scales, *ms = ds + round_up(width, 64);
    const __m512 vscale = _mm512_set1_ps(g.scale);
    // in code units: what the offset of all codes adds; with minima: the sum of x
    const int32_t offset = code_offset(T) * g.sum;
    const __m512 min_factor = _mm512_set1_ps(g.scale * float(g.sum));

    for (int c = 0; c < chunks; c++) {
        vi h[4] = {}, l[4] = {};  // as __m512i, GCC 12 would copy each through the stack
        for (int j = 0; j < n; j += 4) {
            const __m512i a = codes<T>(g.rows[j], chunks, c), b = codes<T>(g.rows[j + 1], chunks, c);
            const __m512i d = codes<T>(g.rows[j + 2], chunks, c), e = codes<T>(g.rows[j + 3], chunks, c);
            const __m512i ab[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)};
            const __m512i de[2] = {_mm512_unpacklo_epi8(d, e), _mm512_unpackhi_epi8(d, e)};
            int32_t xh, xl;
            memcpy(&xh, hi + j, 4);
            memcpy(&xl, lo + j, 4);
            const __m512i vh = _mm512_set1_epi32(xh), vl = _mm512_set1_epi32(xl);
            unroll<4>([&](auto k) {
                const __m512i w = k & 1 ? _mm512_unpackhi_epi16(ab[k / 2], de[k / 2])
                                        : _mm512_unpacklo_epi16(ab[k / 2], de[k / 2]);
                h[k] = (vi)_mm512_dpbusd_epi32((__m512i)h[k], w, vh);
                l[k] = (vi)_mm512_dpbusd_epi32((__m512i)l[k], w, vl);
            });
        }
        __m512i t[4];
        unroll<4>([&](auto k) { t[k] = (__m512i)((h[k] << 7) + l[k] - offset); });
        // unpacking worked within 128-bit lanes: t[k] lane i holds columns 16 i + 4 k; transpose the lanes
        __m512i s0 = _mm512_shuffle_i32x4(t[0], t[1], 0x88), s1 = _mm512_shuffle_i32x4(t[2], t[3], 0x88);
        __m512i s2 = _mm512_shuffle_i32x4(t[0], t[1], 0xdd), s3 = _mm512_shuffle_i32x4(t[2], t[3], 0xdd);
        __m512i v[4] = {_mm512_shuffle_i32x4(s0, s1, 0x88), _mm512_shuffle_i32x4(s2, s3, 0x88),
                        _mm512_shuffle_i32x4(s0, s1, 0xdd), _mm512_shuffle_i32x4(s2, s3, 0xdd)};
        for (int k = 0; k < 4; k++) {
            const int col = c * 64 + k * 16;
            __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(ds + col)));
            __m512 acc = _mm512_loadu_ps(y + col);
            if constexpr (has_min(T)) {
                __m512 m = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(ms + col)));
                acc = _mm512_fmadd_ps(m, min_factor, acc);
            }
            acc = _mm512_fmadd_ps(_mm512_mul_ps(d, vscale), _mm512_cvtepi32_ps(v[k]), acc);
            _mm512_storeu_ps(y + col, acc);
        }
    }
}
#elif defined(PS_AVX2)
// Codes of two rows are paired as int16, so one multiply-add serves two neurons of each column.
template <Type T>
static inline void down_quantized(const uint8_t* const* rows, const float* x, int n, const uint8_t* scales,
                                  int width, float* y) {
    const int chunks = round_up(width, 64) / 64;
    const GroupInts g(rows, x, n);
    const uint16_t *ds = (const uint16_t*)scales, *ms = ds + chunks * 64;
    const __m256i zero = _mm256_setzero_si256(), offset = _mm256_set1_epi32(code_offset(T) * g.sum);
    const __m256 scale = _mm256_set1_ps(g.scale), min_factor = _mm256_set1_ps(g.scale * float(g.sum));
    for (int b = 0; b < chunks * 2; b++) {
        __m256i acc[4] = {zero, zero, zero, zero};
        for (int j = 0; j < n; j += 2) {
            const __m256i u = codes<T>(g.rows[j], chunks, b), v = codes<T>(g.rows[j + 1], chunks, b);
            const __m256i q = _mm256_set1_epi32((g.q[j] & 0xffff) | g.q[j + 1] << 16);
            const __m256i lo = _mm256_unpacklo_epi8(u, v), hi = _mm256_unpackhi_epi8(u, v);
            acc[0] = _mm256_add_epi32(acc[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(lo, zero), q));
            acc[1] = _mm256_add_epi32(acc[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(lo, zero), q));
            acc[2] = _mm256_add_epi32(acc[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(hi, zero), q));
            acc[3] = _mm256_add_epi32(acc[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(hi, zero), q));
        }
        // unpacking worked within 128-bit lanes: acc[k] lane i holds columns 16 i + 4 k
        const __m256i v[4] = {
            _mm256_permute2x128_si256(acc[0], acc[1], 0x20), _mm256_permute2x128_si256(acc[2], acc[3], 0x20),
            _mm256_permute2x128_si256(acc[0], acc[1], 0x31), _mm256_permute2x128_si256(acc[2], acc[3], 0x31)};
        for (int k = 0; k < 4; k++) {
            const int col = b * 32 + k * 8;
            __m256 sum = _mm256_loadu_ps(y + col);
            if constexpr (has_min(T))
                sum = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(ms + col))),
                                      min_factor, sum);
            const __m256 d =
                _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(ds + col))), scale);
            _mm256_storeu_ps(y + col,
                             _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(_mm256_sub_epi32(v[k], offset)), sum));
        }
    }
}
#else
template <Type T>
static inline void down_quantized(const uint8_t* const* rows, const float* x, int n, const uint8_t* scales,
                                  int width, float* y) {
    const uint16_t *ds = (const uint16_t*)scales, *ms = ds + round_up(width, 64);
    float total = 0;
    for (int j = 0; j < n; j++) total += x[j];
    for (int c = 0; c < width; c += W) {
        vf acc = set1(-float(code_offset(T)) * total);
        for (int j = 0; j < n; j++) acc += load_raw<T>(rows[j], width, c) * x[j];
        vf v = load(y + c) + acc * load_half(ds + c);
        if constexpr (has_min(T)) v += load_half(ms + c) * total;
        store(y + c, v);
    }
}
#endif

template <Type T>
static inline void down_rows(const uint8_t* const* rows, const float* x, int n, const uint8_t* scales,
                             int width, float* y) {
    if constexpr (quantized(T))
        down_quantized<T>(rows, x, n, scales, width, y);
    else
        down_float<T>(rows, x, n, width, y);
}

void down(Type type, const uint8_t* const* rows, const float* x, int n, const uint8_t* scales, int width,
          float* y) {
    if (n == 0) return;
#define PS_CALL(T) down_rows<T>(rows, x, n, scales, width, y)
    PS_BY_TYPE(type, PS_CALL)
#undef PS_CALL
}

}  // namespace PS_NS
}  // namespace prosparse
