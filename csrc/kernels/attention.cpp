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
            vf in;
            if (i + 16 <= n)
                in = load(s + i + k) - top;
            else
                for (int j = 0; j < W; j++) in[j] = i + k + j < n ? s[i + k + j] - top : -INFINITY;
            store(e + k, exp(in));
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

constexpr int kHeads = 4;   // query heads that share one look at a key or a value
constexpr int kAhead = 32;  // tokens between the request for a key or a value and its use

static inline void request(const uint16_t* row, int columns) {
    for (int i = 0; i < columns; i += 32) __builtin_prefetch(row + i, 0, 2);
}

static inline float greatest(const float* s, int n) {
    float top = s[0];
    int t = 0;
    if (n >= W) {
        vf tops = load(s);
        for (t = W; t + W <= n; t += W) tops = max(load(s + t), tops);
        for (int i = 0; i < W; i++) top = tops[i] > top ? tops[i] : top;
    }
    for (; t < n; t++) top = s[t] > top ? s[t] : top;
    return top;
}

// sums[h][r] += q[h] . k[r] over N vectors, for H heads and R tokens
template <int H, int R, int N>
static inline void add_products(const float* q, int q_stride, const uint16_t* k, int k_stride,
                                vf (&sums)[H][R]) {
    for (int r = 0; r < R; r++) {
        vf key[N];
        unroll<N>([&](auto i) { key[i] = load_half(k + size_t(r) * size_t(k_stride) + i * W); });
        unroll<H>([&](auto h) {
            vf a[2] = {sums[h][r], vf{}};
            unroll<N>([&](auto i) { a[i & 1] += load(q + size_t(h) * size_t(q_stride) + i * W) * key[i]; });
            sums[h][r] = a[0] + a[1];
        });
    }
}

// Scores of H heads and R tokens, one or as many as a vector holds: their lanes are added up side by side.
template <int H, int R>
static inline void score(const AttendArgs* a, const float* q, int t, float* scores) {
    const int hd = a->head_dim;
    const uint16_t* k = a->k + size_t(t) * size_t(hd);
    vf sums[H][R] = {};
    int c = 0;
    for (; c + 64 <= hd; c += 64) add_products<H, R, 64 / W>(q + c, a->q_stride, k + c, hd, sums);
    for (; c < hd; c += 16) add_products<H, R, 16 / W>(q + c, a->q_stride, k + c, hd, sums);
    unroll<H>([&](auto h) {
        float* out = scores + size_t(h) * size_t(a->n) + t;
        if constexpr (R == W)
            store(out, sums_of(sums[h]) * a->scale);
        else
            *out = sum(sums[h][0]) * a->scale;
    });
}

// out[h][0 .. N*W) = inv[h] sum_t p[h][t] v[t]
template <int H, int N>
static inline void mix_values(const AttendArgs* a, const float* p, const uint16_t* v, const float* inv,
                              float* out) {
    vf acc[H][N] = {};
    for (int t = 0; t < a->n; t++) {
        vf value[N];
        request(v + size_t(t + kAhead) * size_t(a->head_dim), N * W);
        unroll<N>([&](auto i) { value[i] = load_half(v + size_t(t) * size_t(a->head_dim) + i * W); });
        unroll<H>([&](auto h) {
            const vf w = set1(p[size_t(h) * size_t(a->n) + size_t(t)]);
            unroll<N>([&](auto i) { acc[h][i] += value[i] * w; });
        });
    }
    unroll<H>([&](auto h) {
        unroll<N>(
            [&](auto i) { store(out + size_t(h) * size_t(a->out_stride) + i * W, acc[h][i] * inv[h]); });
    });
}

template <int H>
static void attend_heads(const AttendArgs* a, int first) {
    const int hd = a->head_dim, n = a->n;
    const float* q = a->q + size_t(first) * size_t(a->q_stride);
    float* scores = a->scores + size_t(first) * size_t(n);
    float* out = a->out + size_t(first) * size_t(a->out_stride);
    int t = 0;
    for (; t + W <= n; t += W) {
        request(a->k + size_t(t + kAhead) * size_t(hd), W * hd);
        score<H, W>(a, q, t, scores);
    }
    for (; t < n; t++) score<H, 1>(a, q, t, scores);
    float inv[H];
    for (int h = 0; h < H; h++) {
        float* s = scores + size_t(h) * size_t(n);
        inv[h] = 1.0f / softmax(s, n, greatest(s, n));
    }
    // as many columns as sums of all heads fit registers
    constexpr int step = W == 16 || H == 1 ? 64 : 16;
    int c = 0;
    for (; c + step <= hd; c += step) mix_values<H, step / W>(a, scores, a->v + c, inv, out + c);
    for (; c < hd; c += 16) mix_values<H, 16 / W>(a, scores, a->v + c, inv, out + c);
}

void attend(const AttendArgs* a) {
    int h = 0;
    for (; h + kHeads <= a->heads; h += kHeads) attend_heads<kHeads>(a, h);
    switch (a->heads - h) {
        case 3: return attend_heads<3>(a, h);
        case 2: return attend_heads<2>(a, h);
        case 1: return attend_heads<1>(a, h);
    }
}

}  // namespace PS_NS
}  // namespace prosparse
