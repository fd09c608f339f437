// Element-wise operations on activations, and their quantisation.
#include "simd.h"
#include "units.h"

namespace prosparse {
namespace PS_NS {

static inline vf activate(ActFn fn, float param, vf x) {
    switch (fn) {
        case ActFn::silu: return x / (1.0f + exp(-x));
        case ActFn::relu: return x < 0.0f ? vf{} : x;  // this way round NaN stays NaN
        case ActFn::fatrelu: return x < param ? vf{} : x;
        case ActFn::shiftrelu: return x - param < 0.0f ? vf{} : x - param;
        case ActFn::gelu: return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    }
    return x;
}

// Runs `op` on whole vectors and once on a zero-padded copy of the tail.
template <class Op>
static inline void map(const float* x, int n, float* out, Op op) {
    int i = 0;
    for (; i + W <= n; i += W) store(out + i, op(load(x + i), i));
    if (i < n) {
        float in[W] = {}, tail[W];
        for (int k = i; k < n; k++) in[k - i] = x[k];
        store(tail, op(load(in), i));
        for (int k = i; k < n; k++) out[k] = tail[k - i];
    }
}

void activate_all(ActFn fn, float param, const float* x, int n, float* out) {
    map(x, n, out, [=](vf v, int) { return activate(fn, param, v); });
}

void multiply(const float* x, int n, float* y) {
    for (int i = 0; i < n; i++) y[i] *= x[i];
}

void add(float* y, const float* x, float scale, int n) {
    for (int i = 0; i < n; i++) y[i] += scale * x[i];
}

void rmsnorm(const float* x, const float* weight, int n, float eps, float* out) {
    // 16 partial sums whatever the vector width, so every instruction set adds in the same order
    float part[16] = {};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) part[k] += x[i + k] * x[i + k];
    for (; i < n; i++) part[i % 16] += x[i] * x[i];
    for (int step = 8; step; step /= 2)
        for (int k = 0; k < step; k++) part[k] += part[k + step];
    float inv = 1.0f / sqrtf(part[0] / float(n) + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * inv * weight[i];
}

void rope(float* x, const float* cos, const float* sin, int head_dim) {
    int half = head_dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

void to_half(const float* x, int n, uint16_t* out) {
    int i = 0;
#if defined(PS_AVX512)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i*)(out + i),
                            _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(PS_AVX2)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i*)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) out[i] = float_half(x[i]);
}

// The 15-bit integers of a block into the form this instruction set's dot products want (see Acts).
static inline void store_block(const int32_t* q, int b, Acts* out) {
#if defined(PS_AVX512)
    for (int k = 0; k < 32; k += 16) {
        const __m512i v = _mm512_loadu_si512(q + k);
        const __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(64)), 7);
        const __m512i lo = _mm512_sub_epi32(v, _mm512_slli_epi32(hi, 7));
        _mm_storeu_si128((__m128i*)(out->hi + b * 32 + k), _mm512_cvtepi32_epi8(hi));
        _mm_storeu_si128((__m128i*)(out->lo + b * 32 + k), _mm512_cvtepi32_epi8(lo));
    }
#elif defined(PS_AVX2)
    for (int k = 0; k < 16; k++) {
        out->q[b * 32 + k] = int16_t(q[2 * k]);
        out->q[b * 32 + 16 + k] = int16_t(q[2 * k + 1]);
    }
#else
    for (int k = 0; k < 32; k++) out->q[b * 32 + k] = int16_t(q[k]);
#endif
}

void quantize(const float* x, int n, Acts* out) {
    constexpr int kMax = 127 * 128, kVectors = 32 / W;
    const int padded = round_up(n, 64);
    out->n = n;
    for (int b = 0; b < padded / 32; b++) {
        float in[32] = {};
        const int left = n - b * 32;
        if (left > 0) memcpy(in, x + b * 32, size_t(left < 32 ? left : 32) * 4);
        if (out->f) memcpy(out->f + b * 32, in, sizeof in);
        vi top = {};  // magnitudes compare as integers, which keeps NaN the largest
        for (int k = 0; k < kVectors; k++) {
            const vi magnitude = (vi)load(in + k * W) & 0x7fffffff;
            top = magnitude > top ? magnitude : top;
        }
        int32_t peak = 0;
        for (int i = 0; i < W; i++) peak = top[i] > peak ? top[i] : peak;
        const bool finite = peak < 0x7f800000;
        // below the limit kMax / amax would overflow, and the block is as good as zero
        const float amax = bits_float(uint32_t(peak)), inv = amax > 1e-30f && finite ? kMax / amax : 0.0f;
        vi total = {};
        int32_t q[32];
        for (int k = 0; k < kVectors; k++) {
            const vf v = finite ? load(in + k * W) : vf{};
            const vi r = __builtin_convertvector(v * inv + (v < 0.0f ? set1(-0.5f) : set1(0.5f)), vi);
            memcpy(q + k * W, &r, sizeof r);
            total += r;
        }
        store_block(q, b, out);
        int32_t sum_q = 0;
        for (int i = 0; i < W; i++) sum_q += total[i];
        // Inf and NaN stay visibly wrong: NaN as the scale, whatever the codes are
        out->scale[b] = finite ? amax / kMax : NAN;
        out->sum[b] = out->scale[b] * float(sum_q);
    }
}

void sign_scores(const uint64_t* rows, int count, int words, int n, const uint64_t* x, float* out) {
    for (int r = 0; r < count; r++, rows += words) {
        int differ = 0;
        for (int i = 0; i < words; i++) differ += __builtin_popcountll(rows[i] ^ x[i]);
        out[r] = float(n - 2 * differ);
    }
}

float read(const void* p, size_t bytes) {
    const float* f = (const float*)p;
    vf s[8] = {};
    for (size_t i = 0; i + 8 * W <= bytes / 4; i += 8 * W)
        for (int k = 0; k < 8; k++) s[k] += load(f + i + size_t(k) * W);
    return sum(s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7]);
}

}  // namespace PS_NS
}  // namespace prosparse
