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

void attend(const AttendArgs* a) {
    const int hd = a->head_dim, n = a->n;
    for (int t = 0; t < n; t++) {
        const uint16_t* k = a->k + size_t(t) * size_t(hd);
        for (int h = 0; h < a->heads; h++) {
            const float* q = a->q + size_t(h) * size_t(a->q_stride);
            vf acc[2] = {};
            for (int i = 0; i < hd; i += W) acc[i / W & 1] += load(q + i) * load_half(k + i);
            a->scores[size_t(h) * size_t(n) + size_t(t)] = sum(acc[0] + acc[1]) * a->scale;
        }
    }
    for (int h = 0; h < a->heads; h++) {
        float* s = a->scores + size_t(h) * size_t(n);
        float top = s[0];
        for (int t = 1; t < n; t++) top = s[t] > top ? s[t] : top;
        const float total = softmax(s, n, top);
        const float inv = 1.0f / total;
        float* out = a->out + size_t(h) * size_t(a->out_stride);
        constexpr int C = 64 / W;  // columns are summed 64 at a time, in registers
        for (int c = 0; c < hd; c += C * W) {
            vf acc[C] = {};
            const int vecs = (hd - c) / W < C ? (hd - c) / W : C;
            for (int t = 0; t < n; t++) {
                const uint16_t* v = a->v + size_t(t) * size_t(hd) + size_t(c);
                if (vecs == C) {
                    for (int i = 0; i < C; i++) acc[i] += load_half(v + i * W) * s[t];
                } else {
                    for (int i = 0; i < vecs; i++) acc[i] += load_half(v + i * W) * s[t];
                }
            }
            for (int i = 0; i < vecs; i++) store(out + c + i * W, acc[i] * inv);
        }
    }
}

}  // namespace PS_NS
}  // namespace prosparse
