// Row-major weights times one token: the decode path reads each weight once, so the aim is a plain
// sequential stream with as few instructions per byte as the memory bus leaves room for.
//
// Quantised rows: value = d * (code - offset) or d * code + m. With integer activations q (scale s per block)
//   dot = sum_b d_b s_b sum_i code_i q_i  +  sum_b m_b (s_b sum_i q_i),
// the last factor being Acts::sum, so minima and offsets cost one FMA per 16 blocks.
#include "simd.h"
#include "units.h"

namespace prosparse {
namespace PS_NS {

template <Type T>
static inline float dot_float(const uint8_t* row, int cols, const Acts* x) {
    // 4 * 16 running sums in memory order, whatever the vector width: same result on every instruction set
    constexpr int K = 64 / W;
    vf acc[K] = {};
    int i = 0;
    for (; i + 64 <= cols; i += 64)
        for (int k = 0; k < K; k++) acc[k] += load_raw<T>(row, cols, i + k * W) * load(x->f + i + k * W);
    for (int k = 0; i + k * W < cols; k++) acc[k] += load_raw<T>(row, cols, i + k * W) * load(x->f + i + k * W);
    for (int step = K / 2; step; step /= 2)
        for (int k = 0; k < step; k++) acc[k] += acc[k + step];
    return sum(acc[0]);
}

#if defined(PS_AVX512)
template <Type T>
static inline float dot_quantized(const uint8_t* row, int cols, const Acts* x) {
    const int chunks = round_up(cols, 64) / 64, blocks = chunks * 2;
    const uint16_t* scales = (const uint16_t*)(row + code_bytes(T, cols));
    __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, corr = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b += 16) {
        const int n = blocks - b < 16 ? blocks - b : 16;
        const __mmask16 m = __mmask16((1u << n) - 1);
        __m512 d = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, scales + b));
        __m512 xsum = _mm512_maskz_loadu_ps(m, x->sum + b);
        if constexpr (has_min(T)) {
            __m512 min = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, scales + blocks + b));
            corr = _mm512_fmadd_ps(min, xsum, corr);
        } else {
            corr = _mm512_fmadd_ps(d, xsum, corr);
        }
        __m512 s = _mm512_mul_ps(d, _mm512_maskz_loadu_ps(m, x->scale + b));
        __m512i pick = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
        auto step = [&](int c, int k) {
            __m512i w = codes<T>(row, chunks, c);
            __m512i h = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, _mm512_loadu_si512(x->hi + c * 64));
            __m512i l = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, _mm512_loadu_si512(x->lo + c * 64));
            __m512 v = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 7), l));
            __m512i idx = _mm512_add_epi32(pick, _mm512_set1_epi32(2 * k));
            acc[k & 1] = _mm512_fmadd_ps(v, _mm512_permutexvar_ps(idx, s), acc[k & 1]);
        };
        if (n == 16) {
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) step(b / 2 + k, k);
        } else {
            for (int k = 0; k < n / 2; k++) step(b / 2 + k, k);
        }
    }
    float c = _mm512_reduce_add_ps(corr);
    float a = _mm512_reduce_add_ps(_mm512_add_ps(acc[0], acc[1]));
    return has_min(T) ? a + c : a - float(code_offset(T)) * c;
}
#else
// 32 unsigned codes of block b times 32 integer activations.
template <Type T>
static inline int32_t dot_block(const uint8_t* row, int chunks, int b, const int16_t* q) {
#if defined(PS_AVX2)
    __m256i w0, w1;
    if constexpr (T == Type::q8_0) {
        w0 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + b * 32)));
        w1 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + b * 32 + 16)));
    } else {
        __m256i v = _mm256_loadu_si256((const __m256i*)(row + b / 2 * 32));
        if (b & 1) v = _mm256_srli_epi16(v, 4);
        v = _mm256_and_si256(v, _mm256_set1_epi8(15));
        if constexpr (T == Type::q5_1) {
            int32_t bits;
            memcpy(&bits, row + chunks * 32 + b * 4, 4);
            const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
            const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
            __m256i h = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
            v = _mm256_or_si256(v, _mm256_and_si256(_mm256_cmpeq_epi8(h, bit), _mm256_set1_epi8(16)));
        }
        w0 = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(v));
        w1 = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(v, 1));
    }
    __m256i s = _mm256_add_epi32(_mm256_madd_epi16(w0, _mm256_loadu_si256((const __m256i*)q)),
                                 _mm256_madd_epi16(w1, _mm256_loadu_si256((const __m256i*)(q + 16))));
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));
    return _mm_cvtsi128_si32(t);
#else
    int32_t s = 0;
    if constexpr (T == Type::q8_0) {
        for (int k = 0; k < 32; k++) s += row[b * 32 + k] * q[k];
    } else {
        const uint8_t* v = row + b / 2 * 32;
        const int shift = b % 2 * 4;
        for (int k = 0; k < 32; k++) s += (v[k] >> shift & 15) * q[k];
        if constexpr (T == Type::q5_1) {
            uint32_t bits;
            memcpy(&bits, row + chunks * 32 + b * 4, 4);
            for (int k = 0; k < 32; k++) s += int32_t(bits >> k & 1) * 16 * q[k];
        }
    }
    return s;
#endif
}

template <Type T>
static inline float dot_quantized(const uint8_t* row, int cols, const Acts* x) {
    const int chunks = round_up(cols, 64) / 64, blocks = chunks * 2;
    const uint16_t* scales = (const uint16_t*)(row + code_bytes(T, cols));
    float acc[2] = {}, corr[2] = {};
    for (int b = 0; b < blocks; b++) {
        float d = half_float(scales[b]);
        float v = float(dot_block<T>(row, chunks, b, x->q + b * 32));
        acc[b & 1] += v * (d * x->scale[b]);
        corr[b & 1] += (has_min(T) ? half_float(scales[blocks + b]) : d) * x->sum[b];
    }
    float a = acc[0] + acc[1], c = corr[0] + corr[1];
    return has_min(T) ? a + c : a - float(code_offset(T)) * c;
}
#endif

template <Type T>
static inline float dot_row(const uint8_t* row, int cols, const Acts* x) {
    if constexpr (quantized(T)) return dot_quantized<T>(row, cols, x);
    else return dot_float<T>(row, cols, x);
}

void matvec(const Matrix* w, int r0, int r1, const Acts* x, float* out) {
#define PS_CALL(T) \
    for (int r = r0; r < r1; r++) out[r - r0] = dot_row<T>(w->row(r), w->cols, x)
    PS_BY_TYPE(w->type, PS_CALL)
#undef PS_CALL
}

float dot(Type type, const uint8_t* row, int cols, const Acts* x) {
#define PS_CALL(T) return dot_row<T>(row, cols, x)
    PS_BY_TYPE(type, PS_CALL)
#undef PS_CALL
    return 0;
}

template <Type T>
static void dequantize_row(const uint8_t* row, int cols, float* out) {
    const uint16_t* scales = (const uint16_t*)(row + code_bytes(T, cols));
    const int blocks = scale_blocks(cols);
    for (int i = 0; i < cols; i += 32) {
        float d = 1, m = 0;
        if constexpr (quantized(T)) {
            d = half_float(scales[i / 32]);
            m = has_min(T) ? half_float(scales[blocks + i / 32]) : -float(code_offset(T)) * d;
        }
        for (int k = i; k < i + 32 && k < cols; k += W) {
            vf v = load_raw<T>(row, cols, k);
            if constexpr (quantized(T)) v = v * d + m;
            if (k + W <= cols) {
                store(out + k, v);
            } else {
                for (int j = 0; k + j < cols; j++) out[k + j] = v[j];
            }
        }
    }
}

void dequantize(Type type, const uint8_t* row, int cols, float* out) {
#define PS_CALL(T) dequantize_row<T>(row, cols, out)
    PS_BY_TYPE(type, PS_CALL)
#undef PS_CALL
}

}  // namespace PS_NS
}  // namespace prosparse
