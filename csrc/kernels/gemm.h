// What the two kinds of prefill product share.
#pragma once
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
constexpr int kKB = 256;

// In place, r[i][j] <-> r[j][i].
static inline void transpose(vf r[W]) {
#if defined(PS_AVX512)
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32((__m512i)r[i], (__m512i)r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32((__m512i)r[i], (__m512i)r[i + 1]);
    }
    __m512i u[16];
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = (vf)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = (vf)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = (vf)_mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = (vf)_mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
#elif defined(PS_AVX2)
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
#else
    for (int i = 0; i < W; i++) {
        for (int j = 0; j < i; j++) {
            const float x = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = x;
        }
    }
#endif
}

// Quantised weights without leaving integers; AVX-512 only.
size_t int8_a_bytes(int m, int k);
void int8_pack_a(Type type, const float* x, int m, int k, int ldx, void* a);
void int8_gemm(const Matrix* w, int panel, const void* a, int m, float* c, int ldc, void* tile);
void int8_gemm_down(const Neurons* w, int panel, const void* a, int m, float* c, int ldc, void* tile);

}  // namespace PS_NS
}  // namespace prosparse
