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

#if defined(PS_AVX512)
// Bytes of four rows are interleaved so that one VNNI instruction adds four neurons to each column.
// x is a 15-bit integer, 128*hi + lo, under one scale for the group.
template <Type T>
static inline void down_quantized(const uint8_t* const* rows, const float* x, int n, const uint8_t* scales, int width,
                                  float* y) {
    const int chunks = round_up(width, 64) / 64;
    float amax = 0, total = 0;
    for (int j = 0; j < n; j++) {
        amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
        total += x[j];
    }
    const float inv = amax > 0 ? 127 * 128 / amax : 0.0f;
    const float scale = (amax / (127 * 128)) + total * 0.0f;  // a NaN or Inf must survive
    alignas(4) int8_t hi[kGroup] = {}, lo[kGroup] = {};
    const uint8_t* r[kGroup];
    int32_t qsum = 0;
    for (int j = 0; j < n; j++) {
        int32_t q = int32_t(x[j] * inv + (x[j] < 0 ? -0.5f : 0.5f)), h = (q + 64) >> 7;
        hi[j] = int8_t(h);
        lo[j] = int8_t(q - h * 128);
        qsum += q;
        r[j] = rows[j];
    }
    for (int j = n; j < round_up(n, 4); j++) r[j] = rows[n - 1];
    const uint16_t *ds = (const uint16_t*)scales, *ms = ds + round_up(width, 64);
    const __m512 vscale = _mm512_set1_ps(scale);
    // in code units: what the offset of all codes adds; with minima: the sum of x
    const __m512i offset = _mm512_set1_epi32(code_offset(T) * qsum);
    const __m512 min_factor = _mm512_set1_ps(scale * float(qsum));

    for (int c = 0; c < chunks; c++) {
        __m512i h[4], l[4];
        for (int k = 0; k < 4; k++) h[k] = l[k] = _mm512_setzero_si512();
        for (int j = 0; j < n; j += 4) {
            __m512i a = codes<T>(r[j], chunks, c), b = codes<T>(r[j + 1], chunks, c);
            __m512i d = codes<T>(r[j + 2], chunks, c), e = codes<T>(r[j + 3], chunks, c);
            __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
            __m512i de0 = _mm512_unpacklo_epi8(d, e), de1 = _mm512_unpackhi_epi8(d, e);
            __m512i w[4] = {_mm512_unpacklo_epi16(ab0, de0), _mm512_unpackhi_epi16(ab0, de0),
                            _mm512_unpacklo_epi16(ab1, de1), _mm512_unpackhi_epi16(ab1, de1)};
            int32_t xh, xl;
            memcpy(&xh, hi + j, 4);
            memcpy(&xl, lo + j, 4);
            __m512i vh = _mm512_set1_epi32(xh), vl = _mm512_set1_epi32(xl);
            for (int k = 0; k < 4; k++) {
                h[k] = _mm512_dpbusd_epi32(h[k], w[k], vh);
                l[k] = _mm512_dpbusd_epi32(l[k], w[k], vl);
            }
        }
        __m512i t[4];
        for (int k = 0; k < 4; k++)
            t[k] = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(h[k], 7), l[k]), offset);
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
#else
template <Type T>
static inline void down_quantized(const uint8_t* const* rows, const float* x, int n, const uint8_t* scales, int width,
                                  float* y) {
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
static inline void down_rows(const uint8_t* const* rows, const float* x, int n, const uint8_t* scales, int width,
                             float* y) {
    if constexpr (quantized(T)) down_quantized<T>(rows, x, n, scales, width, y);
    else down_float<T>(rows, x, n, width, y);
}

void down(Type type, const uint8_t* const* rows, const float* x, int n, const uint8_t* scales, int width, float* y) {
    if (n == 0) return;
#define PS_CALL(T) down_rows<T>(rows, x, n, scales, width, y)
    PS_BY_TYPE(type, PS_CALL)
#undef PS_CALL
}

}  // namespace PS_NS
}  // namespace prosparse
