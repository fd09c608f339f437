// Prefill: C[m][n] = sum_k A[m][k] W[n][k] for many tokens m. A panel of W (3 vectors of outputs, 512 inputs)
// is dequantised once into an L2-resident tile and met by all tokens, so its cost fades with m.
// Tiles are f32 for f32 weights, bf16 pairs under AVX512-BF16 for the others (vdpbf16ps, f32 accumulation).
// A: tokens in tiles of kMR, row-major inside, padded with zero rows. The order of additions depends on
// neither the number of tokens nor of threads.
#include "simd.h"
#include "units.h"

namespace prosparse {
namespace PS_NS {

#if defined(PS_AVX512) || defined(__aarch64__)
constexpr int kMR = 8;  // 24 of 32 registers accumulate
#else
constexpr int kMR = 4;  // 12 of 16
#endif
constexpr int kNR = 3 * W;
constexpr int kKB = 512;

const int kPanel = kNR;
const int kTokenTile = kMR;

#if defined(PS_AVX512)
constexpr bool use_bf16(Type t) { return t != Type::f32; }
#else
constexpr bool use_bf16(Type) { return false; }
#endif

static inline int padded_k(int k) { return round_up(k, 2); }

size_t gemm_a_bytes(Type type, int m, int k) {
    return size_t(round_up(m, kMR)) * size_t(padded_k(k)) * (use_bf16(type) ? 2 : 4);
}
// one tile and the dequantised rows it is made from
size_t gemm_scratch_bytes(int) { return size_t(kNR) * kKB * 4 * 2; }

static inline uint16_t to_bf16(float x) {
    uint32_t u = float_bits(x);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

void gemm_pack_a(Type type, const float* x, int m, int k, int ldx, void* a) {
    const int kp = padded_k(k);
    for (int i = 0; i < round_up(m, kMR); i++) {
        const float* row = x + size_t(i) * size_t(ldx);
        if (use_bf16(type)) {
            uint16_t* out = (uint16_t*)a + size_t(i) * size_t(kp);
            for (int j = 0; j < k; j++) out[j] = i < m ? to_bf16(row[j]) : 0;
            if (kp > k) out[k] = 0;
        } else {
            float* out = (float*)a + size_t(i) * size_t(kp);
            for (int j = 0; j < k; j++) out[j] = i < m ? row[j] : 0.0f;
            if (kp > k) out[k] = 0;
        }
    }
}

// c[kMR][kNR] += a . tile over kb inputs
static inline void micro_f32(const float* a, int lda, const float* tile, int kb, float* c, int ldc, bool first) {
    vf acc[kMR][3];
    for (int i = 0; i < kMR; i++)
        for (int v = 0; v < 3; v++) acc[i][v] = first ? vf{} : load(c + size_t(i) * size_t(ldc) + v * W);
    for (int k = 0; k < kb; k++) {
        vf b[3];
        for (int v = 0; v < 3; v++) b[v] = load(tile + k * kNR + v * W);
        for (int i = 0; i < kMR; i++) {
            vf s = set1(a[size_t(i) * size_t(lda) + size_t(k)]);
            for (int v = 0; v < 3; v++) acc[i][v] += s * b[v];
        }
    }
    for (int i = 0; i < kMR; i++)
        for (int v = 0; v < 3; v++) store(c + size_t(i) * size_t(ldc) + v * W, acc[i][v]);
}

#if defined(PS_AVX512)
static inline void micro_bf16(const uint16_t* a, int lda, const uint32_t* tile, int pairs, float* c, int ldc,
                              bool first) {
    __m512 acc[kMR][3];
    for (int i = 0; i < kMR; i++)
        for (int v = 0; v < 3; v++)
            acc[i][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + size_t(i) * size_t(ldc) + v * W);
    for (int p = 0; p < pairs; p++) {
        __m512bh b[3];
        for (int v = 0; v < 3; v++) b[v] = (__m512bh)_mm512_loadu_si512(tile + p * kNR + v * W);
        for (int i = 0; i < kMR; i++) {
            int32_t s;
            memcpy(&s, a + size_t(i) * size_t(lda) + size_t(p) * 2, 4);
            for (int v = 0; v < 3; v++) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], (__m512bh)_mm512_set1_epi32(s), b[v]);
        }
    }
    for (int i = 0; i < kMR; i++)
        for (int v = 0; v < 3; v++) _mm512_storeu_ps(c + size_t(i) * size_t(ldc) + v * W, acc[i][v]);
}

static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

static inline __m512i pair_bf16(const float* p) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p));
}
#endif

// Inputs k0..k0+kb of rows n0..n0+kNR, dequantised into rows[kNR][kKB]; k0 is a multiple of 32.
template <Type T>
static void fetch_rows(const Matrix* w, int n0, int k0, int kb, float* rows) {
    for (int r = 0; r < kNR; r++) {
        float* out = rows + r * kKB;
        if (n0 + r >= w->rows) {
            memset(out, 0, size_t(round_up(kb, 32)) * 4);
            continue;
        }
        const uint8_t* row = w->row(n0 + r);
        const uint16_t* scales = (const uint16_t*)(row + code_bytes(T, w->cols));
        for (int k = 0; k < kb; k += 32) {
            float d = 1, m = 0;
            if constexpr (quantized(T)) {
                const int b = (k0 + k) / 32;
                d = half_float(scales[b]);
                m = has_min(T) ? half_float(scales[scale_blocks(w->cols) + b]) : -float(code_offset(T)) * d;
            }
            for (int i = k; i < k + 32; i += W) {
                vf v = {};
                if (quantized(T) || k0 + i < w->cols) v = load_raw<T>(row, w->cols, k0 + i);
                if constexpr (quantized(T)) v = v * d + m;
                store(out + i, v);
            }
        }
    }
}

static void tile_from_rows(const float* rows, int kb, bool bf16, void* tile) {
#if defined(PS_AVX512)
    const int step = bf16 ? 32 : 16;
    for (int k = 0; k < kb; k += step) {
        for (int v = 0; v < 3; v++) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                const float* p = rows + (v * 16 + i) * kKB + k;
                r[i] = bf16 ? pair_bf16(p) : _mm512_loadu_si512(p);
            }
            transpose16(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512((uint32_t*)tile + (k * 16 / step + i) * kNR + v * 16, r[i]);
        }
    }
#else
    (void)bf16;
    for (int k = 0; k < kb; k++)
        for (int r = 0; r < kNR; r++) ((float*)tile)[k * kNR + r] = rows[r * kKB + k];
#endif
}

// Every token against one tile; `c` starts at the panel's first column.
static void multiply_tile(const void* a, int m, int k, int k0, int kb, const void* tile, bool bf16, float* c, int ldc,
                          bool first) {
    const int kp = padded_k(k);
    for (int i = 0; i < m; i += kMR) {
        const size_t at = size_t(i) * size_t(kp) + size_t(k0);
        float* out = c + size_t(i) * size_t(ldc);
#if defined(PS_AVX512)
        if (bf16) {
            micro_bf16((const uint16_t*)a + at, kp, (const uint32_t*)tile, (kb + 1) / 2, out, ldc, first);
            continue;
        }
#else
        (void)bf16;
#endif
        micro_f32((const float*)a + at, kp, (const float*)tile, kb, out, ldc, first);
    }
}

void gemm(const Matrix* w, int panel, const void* a, int m, float* c, int ldc, void* scratch) {
    float* rows = (float*)scratch;
    void* tile = rows + kNR * kKB;
    const bool bf16 = use_bf16(w->type);
    for (int k0 = 0; k0 < w->cols; k0 += kKB) {
        const int kb = w->cols - k0 < kKB ? w->cols - k0 : kKB;
#define PS_CALL(T) fetch_rows<T>(w, panel * kNR, k0, kb, rows)
        PS_BY_TYPE(w->type, PS_CALL)
#undef PS_CALL
        tile_from_rows(rows, kb, bf16, tile);
        multiply_tile(a, m, w->cols, k0, kb, tile, bf16, c + panel * kNR, ldc, k0 == 0);
    }
}

// Columns c0..c0+kNR of neurons j0..j0+kb of the transposed down matrix, dequantised into tile order.
template <Type T>
static void fetch_neurons(const Neurons* w, int c0, int j0, int kb, float* rows) {
    const int width = w->width;
    for (int j = 0; j < kb; j++) {
        const uint8_t* row = w->down(j0 + j);
        const uint16_t* ds = (const uint16_t*)w->group_scales((j0 + j) / kGroup);
        const uint16_t* ms = ds + round_up(width, 64);
        for (int v = 0; v < 3; v++) {
            const int c = c0 + v * W;
            vf x = {};
            if (c < width) {
                x = load_raw<T>(row, width, c);
                if constexpr (quantized(T)) {
                    vf d = load_half(ds + c);
                    x = has_min(T) ? x * d + load_half(ms + c) : (x - float(code_offset(T))) * d;
                }
            }
            store(rows + j * kNR + v * W, x);
        }
    }
}

void gemm_down(const Neurons* w, int panel, const void* a, int m, float* c, int ldc, void* scratch) {
    float* rows = (float*)scratch;
    const bool bf16 = use_bf16(w->down_type);
    for (int j0 = 0; j0 < w->count; j0 += kKB) {
        const int kb = w->count - j0 < kKB ? w->count - j0 : kKB;
#define PS_CALL(T) fetch_neurons<T>(w, panel * kNR, j0, kb, rows)
        PS_BY_TYPE(w->down_type, PS_CALL)
#undef PS_CALL
        const void* tile = rows;
#if defined(PS_AVX512)
        if (bf16) {  // pairs of neurons side by side in each column
            if (kb & 1) memset(rows + kb * kNR, 0, kNR * 4);
            uint32_t* out = (uint32_t*)(rows + kNR * kKB);
            for (int p = 0; p < (kb + 1) / 2; p++) {
                for (int v = 0; v < 3; v++) {
                    __m512i lo = _mm512_cvtepu16_epi32(
                        (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(rows + 2 * p * kNR + v * 16)));
                    __m512i hi = _mm512_cvtepu16_epi32(
                        (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(rows + (2 * p + 1) * kNR + v * 16)));
                    _mm512_storeu_si512(out + p * kNR + v * 16, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
                }
            }
            tile = out;
        }
#endif
        multiply_tile(a, m, w->count, j0, kb, tile, bf16, c + panel * kNR, ldc, j0 == 0);
    }
}

}  // namespace PS_NS
}  // namespace prosparse
