// Prefill: C[m][n] = sum_k A[m][k] W[n][k] for many tokens m. A panel of W (3 vectors of outputs, 256 inputs)
// is unpacked once into an L1-resident tile and met by all tokens, so its cost fades with m.
// Quantised weights stay integers where VNNI is there (gemm_int8.cpp). Other tiles are f32, but bf16 pairs
// for bf16 weights under AVX512-BF16 (vdpbf16ps, f32 accumulation). A: tokens in tiles of kMR, row-major
// inside, padded with zero rows. The order of additions depends on neither the number of tokens nor of
// threads.
#include "gemm.h"

namespace prosparse {
namespace PS_NS {

const int kPanel = kNR;
const int kTokenTile = kMR;

#if defined(PS_BF16)
constexpr bool use_bf16(Type t) { return t == Type::bf16; }
#else
constexpr bool use_bf16(Type) { return false; }
#endif
#if defined(PS_AVX512)
constexpr bool use_int8(Type t) { return quantized(t); }
#else
constexpr bool use_int8(Type) { return false; }
#endif

static inline int padded_k(int k) { return round_up(k, 2); }

size_t gemm_a_bytes(Type type, int m, int k) {
    if (use_int8(type)) return int8_a_bytes(m, k);
    return size_t(round_up(m, kMR)) * size_t(padded_k(k)) * (use_bf16(type) ? 2 : 4);
}
size_t gemm_scratch_bytes() { return size_t(kNR) * kKB * 4; }

static inline uint16_t to_bf16(float x) {
    uint32_t u = float_bits(x);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

void gemm_pack_a(Type type, const float* x, int m, int k, int ldx, void* a) {
    if (use_int8(type)) return int8_pack_a(type, x, m, k, ldx, a);
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
static inline void micro_f32(const float* a, int lda, const float* tile, int kb, float* c, int ldc,
                             bool first) {
    vf acc[kMR][3];
    unroll<kMR>([&](auto i) {
        unroll<3>([&](auto v) { acc[i][v] = first ? vf{} : load(c + size_t(i) * size_t(ldc) + v * W); });
    });
    for (int k = 0; k < kb; k++) {
        vf b[3];
        unroll<3>([&](auto v) { b[v] = load(tile + k * kNR + v * W); });
        unroll<kMR>([&](auto i) {
            const vf s = set1(a[size_t(i) * size_t(lda) + size_t(k)]);
            unroll<3>([&](auto v) { acc[i][v] += s * b[v]; });
        });
    }
    unroll<kMR>(
        [&](auto i) { unroll<3>([&](auto v) { store(c + size_t(i) * size_t(ldc) + v * W, acc[i][v]); }); });
}

#if defined(PS_BF16)
static inline void micro_bf16(const uint16_t* a, int lda, const uint32_t* tile, int pairs, float* c, int ldc,
                              bool first) {
    __m512 acc[kMR][3];
    unroll<kMR>([&](auto i) {
        unroll<3>([&](auto v) {
            acc[i][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + size_t(i) * size_t(ldc) + v * W);
        });
    });
    for (int p = 0; p < pairs; p++) {
        __m512bh b[3];
        unroll<3>([&](auto v) { b[v] = (__m512bh)_mm512_loadu_si512(tile + p * kNR + v * W); });
        unroll<kMR>([&](auto i) {
            int32_t pair;
            memcpy(&pair, a + size_t(i) * size_t(lda) + size_t(p) * 2, 4);
            const __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
            unroll<3>([&](auto v) { acc[i][v] = _mm512_dpbf16_ps(acc[i][v], s, b[v]); });
        });
    }
    unroll<kMR>([&](auto i) {
        unroll<3>([&](auto v) { _mm512_storeu_ps(c + size_t(i) * size_t(ldc) + v * W, acc[i][v]); });
    });
}
#endif

// Every token against one tile; `c` starts at the panel's first column.
static void multiply_tile(const void* a, int m, int k, int k0, int kb, const void* tile, bool bf16, float* c,
                          int ldc) {
    const int kp = padded_k(k);
    for (int i = 0; i < m; i += kMR) {
        const size_t at = size_t(i) * size_t(kp) + size_t(k0);
        float* out = c + size_t(i) * size_t(ldc);
#if defined(PS_BF16)
        if (bf16) {
            micro_bf16((const uint16_t*)a + at, kp, (const uint32_t*)tile, (kb + 1) / 2, out, ldc, k0 == 0);
            continue;
        }
#else
        (void)bf16;
#endif
        micro_f32((const float*)a + at, kp, (const float*)tile, kb, out, ldc, k0 == 0);
    }
}

// Inputs k0..k0+kb of outputs n0..n0+kNR, dequantised and transposed into tile order; k0 is a multiple of 32.
template <Type T>
static void fetch_tile(const Matrix* w, int n0, int k0, int kb, void* tile) {
    const int blocks = scale_blocks(w->cols);
    for (int v = 0; v < kNR; v += W) {
        const uint8_t* row[W];
        for (int i = 0; i < W; i++) row[i] = n0 + v + i < w->rows ? w->row(n0 + v + i) : nullptr;
        for (int k = 0; k < kb; k += 32) {
            float d[W], m[W];
            if constexpr (quantized(T)) {
                for (int i = 0; i < W; i++) {
                    d[i] = m[i] = 0;
                    if (!row[i]) continue;
                    const uint16_t* scales =
                        (const uint16_t*)(row[i] + code_bytes(T, w->cols)) + (k0 + k) / 32;
                    d[i] = half_float(scales[0]);
                    m[i] = has_min(T) ? half_float(scales[blocks]) : -float(code_offset(T)) * d[i];
                }
            }
            auto load_square = [&](int col, vf r[W]) {
                for (int i = 0; i < W; i++) {
                    r[i] = vf{};
                    if (row[i] && (quantized(T) || col < w->cols)) r[i] = load_raw<T>(row[i], w->cols, col);
                    if constexpr (quantized(T)) r[i] = r[i] * d[i] + m[i];
                }
            };
            vf r[W];
#if defined(PS_BF16)
            if constexpr (use_bf16(T)) {
                vf s[W];
                load_square(k0 + k, r);
                load_square(k0 + k + 16, s);
                for (int i = 0; i < W; i++) r[i] = (vf)_mm512_cvtne2ps_pbh((__m512)s[i], (__m512)r[i]);
                transpose(r);
                for (int i = 0; i < W; i++) store((float*)tile + (k / 2 + i) * kNR + v, r[i]);
                continue;
            }
#endif
            for (int c = 0; c < 32; c += W) {
                load_square(k0 + k + c, r);
                transpose(r);
                for (int i = 0; i < W; i++) store((float*)tile + (k + c + i) * kNR + v, r[i]);
            }
        }
    }
}

void gemm(const Matrix* w, int panel, const void* a, int m, float* c, int ldc, void* tile) {
    if (use_int8(w->type)) return int8_gemm(w, panel, a, m, c, ldc, tile);
    for (int k0 = 0; k0 < w->cols; k0 += kKB) {
        const int kb = w->cols - k0 < kKB ? w->cols - k0 : kKB;
#define PS_CALL(T) fetch_tile<T>(w, panel * kNR, k0, kb, tile)
        PS_BY_TYPE(w->type, PS_CALL)
#undef PS_CALL
        multiply_tile(a, m, w->cols, k0, kb, tile, use_bf16(w->type), c + panel * kNR, ldc);
    }
}

// W columns from c of neuron j's down row.
template <Type T>
static inline vf neuron_columns(const Neurons* w, int j, int c) {
    if (j >= w->count || c >= w->width) return vf{};
    vf x = load_raw<T>(w->down(j), w->width, c);
    if constexpr (quantized(T)) {
        const uint16_t* scales = (const uint16_t*)w->group_scales(j / kGroup);
        const vf d = load_half(scales + c);
        x = has_min(T) ? x * d + load_half(scales + round_up(w->width, 64) + c)
                       : (x - float(code_offset(T))) * d;
    }
    return x;
}

// The same tile from neuron-major weights: already in tile order.
template <Type T>
static void fetch_neurons(const Neurons* w, int c0, int j0, int kb, void* tile) {
    for (int v = 0; v < kNR; v += W) {
#if defined(PS_BF16)
        if constexpr (use_bf16(T)) {  // pairs of neurons side by side in each column
            for (int j = 0; j < kb; j += 2) {
                const vf x = neuron_columns<T>(w, j0 + j, c0 + v),
                         y = neuron_columns<T>(w, j0 + j + 1, c0 + v);
                const __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
                const __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)y));
                _mm512_storeu_si512((uint32_t*)tile + j / 2 * kNR + v,
                                    _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
            }
            continue;
        }
#endif
        for (int j = 0; j < kb; j++) store((float*)tile + j * kNR + v, neuron_columns<T>(w, j0 + j, c0 + v));
    }
}

void gemm_down(const Neurons* w, int panel, const void* a, int m, float* c, int ldc, void* tile) {
    if (use_int8(w->down_type)) return int8_gemm_down(w, panel, a, m, c, ldc, tile);
    for (int j0 = 0; j0 < w->count; j0 += kKB) {
        const int kb = w->count - j0 < kKB ? w->count - j0 : kKB;
#define PS_CALL(T) fetch_neurons<T>(w, panel * kNR, j0, kb, tile)
        PS_BY_TYPE(w->down_type, PS_CALL)
#undef PS_CALL
        multiply_tile(a, m, w->count, j0, kb, tile, use_bf16(w->down_type), c + panel * kNR, ldc);
    }
}

}  // namespace PS_NS
}  // namespace prosparse
