// Softmax attention of the query heads of one token that share a KV head, over an f16 cache.
#include "simd.h"
#include "units.h"

namespace prosparse {
namespace PS_NS {

// s[i] <- e^(s[i] - top); returns the sum. Sixteen partial sums of one order on every instruction set.
static inline float softmax(float* s, int n, float top) {
    float part[16] = {};
    for (int i = 0; i < n; i += 16) {
        float e[16];
        for (int k = 0; k < 16; k += W) {
            float in[W];
            for (int j = 0; j < W; j++) in[j] = i + k + j < n ? s[i + k + j] - top : -INFINITY;
            store(e + k, exp(load(in)));
        }
        for (int k = 0; k < 16 && i + k < n; k++) {
            s[i + k] = e[k];
            part[k] += e[k];
        }
    }
    float total = 0;
    for (int k = 0; k < 16; k++) total += part[k];
    return total;
}

// q . k over N vectors; a constant N keeps the sums in registers
template <int N>
static inline vf dot_head(const float* q, const uint16_t* k, vf acc) {
    vf a[2] = {acc, vf{}};
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) a[i & 1] += load(q + i * W) * load_half(k + i * W);
    return a[0] + a[1];
}

// out[0 .. N*W) = sum_t p[t] v[t]
template <int N>
static inline void mix_values(const float* p, const uint16_t* v, int n, int stride, float inv, float* out) {
    vf acc[N] = {};
    for (int t = 0; t < n; t++) {
        const vf w = set1(p[t]);
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) acc[i] += load_half(v + size_t(t) * size_t(stride) + i * W) * w;
    }
    for (int i = 0; i < N; i++) store(out + i * W, acc[i] * inv);
}

void attend(const AttendArgs* a) {
    const int hd = a->head_dim, n = a->n;
    for (int t = 0; t < n; t++) {
        const uint16_t* k = a->k + size_t(t) * size_t(hd);
        for (int h = 0; h < a->heads; h++) {
            const float* q = a->q + size_t(h) * size_t(a->q_stride);
            vf acc = {};
            int c = 0;
            for (; c + 64 <= hd; c += 64) acc = dot_head<64 / W>(q + c, k + c, acc);
            for (; c < hd; c += 16) acc = dot_head<16 / W>(q + c, k + c, acc);
            a->scores[size_t(h) * size_t(n) + size_t(t)] = sum(acc) * a->scale;
        }
    }
    for (int h = 0; h < a->heads; h++) {
        float* s = a->scores + size_t(h) * size_t(n);
        float top = s[0];
        for (int t = 1; t < n; t++) top = s[t] > top ? s[t] : top;
        const float inv = 1.0f / softmax(s, n, top);
        float* out = a->out + size_t(h) * size_t(a->out_stride);
        int c = 0;
        for (; c + 64 <= hd; c += 64) mix_values<64 / W>(s, a->v + c, n, hd, inv, out + c);
        for (; c < hd; c += 16) mix_values<16 / W>(s, a->v + c, n, hd, inv, out + c);
    }
}

}  // namespace PS_NS
}  // namespace prosparse
