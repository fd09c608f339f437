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

void quantize(const float* x, int n, Acts* out) {
    constexpr int kMax = 127 * 128;
    const int padded = round_up(n, 64);
    out->n = n;
    for (int b = 0; b < padded / 32; b++) {
        float v[32] = {};
        const int left = n - b * 32;
        if (left > 0) memcpy(v, x + b * 32, size_t(left < 32 ? left : 32) * 4);
        if (out->f) memcpy(out->f + b * 32, v, sizeof v);
        int32_t top = 0;  // magnitudes compare as integers, which vectorises where float max does not
        for (int k = 0; k < 32; k++) {
            int32_t mag = int32_t(float_bits(v[k]) & 0x7fffffff);
            top = mag > top ? mag : top;
        }
        const float amax = bits_float(uint32_t(top));
        const float inv = amax > 0 && top < 0x7f800000 ? kMax / amax : 0.0f;
        int32_t total = 0, q[32];
        for (int k = 0; k < 32; k++) {
            q[k] = int32_t(v[k] * inv + (v[k] < 0 ? -0.5f : 0.5f));
            total += q[k];
        }
#if defined(PS_AVX512)
        for (int k = 0; k < 32; k++) {
            int32_t hi = (q[k] + 64) >> 7;
            out->hi[b * 32 + k] = int8_t(hi);
            out->lo[b * 32 + k] = int8_t(q[k] - hi * 128);
        }
#elif defined(PS_AVX2)
        for (int k = 0; k < 16; k++) {
            out->q[b * 32 + k] = int16_t(q[2 * k]);
            out->q[b * 32 + 16 + k] = int16_t(q[2 * k + 1]);
        }
#else
        for (int k = 0; k < 32; k++) out->q[b * 32 + k] = int16_t(q[k]);
#endif
        // Inf and NaN stay visibly wrong: NaN as the scale, whatever the codes are
        out->scale[b] = top < 0x7f800000 ? amax / kMax : NAN;
        out->sum[b] = out->scale[b] * float(total);
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
