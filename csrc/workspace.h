// Scratch of one forward pass, reused between calls.
#pragma once
#include <algorithm>
#include <cstring>
#include <new>

#include "model.h"

namespace prosparse {

inline constexpr int kBatch = 128;  // tokens a prefill step takes through the layers together
inline constexpr int kSegments =
    16;  // exact FFN: parts with a partial sum of their own, whatever the thread count

// requests of one group: records of two rows, and scales that are longer than those, with all types in
// between
inline constexpr int kWanted = 16 * kGroup;

// Rows of products start on cache lines, so that threads working on neighbouring columns never share one.
template <class T>
struct LineAligned {
    using value_type = T;
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const LineAligned&) const = default;
};
using Batch = std::vector<float, LineAligned<float>>;

// Activations and the arrays they are quantised into.
struct ActBuffer {
    std::vector<float> f, scale, sum;
    std::vector<int16_t> q;
    std::vector<int8_t> hi, lo;
    Acts acts{};

    void resize(int n) {
        const size_t p = size_t(round_up(n, 64)), blocks = size_t(round_up(n, 512)) / 32;
        f.assign(p, 0), q.assign(p, 0), hi.assign(p, 0), lo.assign(p, 0);
        scale.assign(blocks, 0), sum.assign(blocks, 0);  // kernels load scales 16 at a time
        acts = {n, f.data(), q.data(), hi.data(), lo.data(), scale.data(), sum.data()};
    }
    // values [at, at + n) as activations of their own; `at` is a multiple of 64
    Acts slice(int at, int n) const {
        return {n,
                acts.f + at,
                acts.q + at,
                acts.hi + at,
                acts.lo + at,
                acts.scale + at / 32,
                acts.sum + at / 32};
    }
};

// The item that the k-th claim of a job means: threads that claim in turns then read one stream each, so that
// what a core requests ahead at an item's end is what it wants next.
inline int in_stream(int k, int items, int n_threads) {
    const int t = k % n_threads, each = items / n_threads, longer = items % n_threads;
    return t * each + std::min(t, longer) + k / n_threads;
}

// Requests a range into the second-level cache.
inline void prefetch(const uint8_t* p, size_t bytes) {
    for (size_t i = 0; i < bytes + 63; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Rows of `bytes` that are wanted soon, requested one at a time while something else is computed.
class Wanted {
  public:
    explicit Wanted(size_t bytes) : bytes_(bytes) {}
    void add(const uint8_t* p, size_t length) {
        for (size_t i = 0; i < length && n_ < kWanted; i += bytes_) rows_[n_++] = p + i;
    }
    // the next one, or `here` where there is none: requesting what is at hand costs nothing
    const uint8_t* next(const uint8_t* here) { return at_ < n_ ? rows_[at_++] : here; }
    // whether another is to be requested at step `i` of `of`, so that they are spread evenly
    bool due(int i, int of) const { return at_ * of < n_ * i; }
    void finish() {
        for (; at_ < n_; at_++) prefetch(rows_[at_], bytes_);
        at_ = n_ = 0;
    }

  private:
    size_t bytes_;
    int at_ = 0, n_ = 0;
    const uint8_t* rows_[kWanted];
};

// A bit a value, set where it is negative; the last word is filled up with zeros.
inline void sign_bits(const float* x, int n, uint64_t* out) {
    for (int i = 0; i < n; i += 64) {
        uint64_t bits = 0;
        for (int k = i; k < std::min(n, i + 64); k++) bits |= uint64_t(x[k] < 0) << (k - i);
        out[i / 64] = bits;
    }
}

struct Model::Workspace {
    explicit Workspace(const Config& c) {
        x.resize(size_t(c.hidden_size));
        q.resize(size_t(c.q_size()));
        k.resize(size_t(c.kv_size()));
        v.resize(size_t(c.kv_size()));
        attn.resize(c.q_size());
        in.resize(c.hidden_size);
        hidden.resize(c.intermediate_size);
        up.resize(size_t(c.intermediate_size));
        residual.resize(c.hidden_size);
        signs.resize(size_t(c.hidden_size + 63) / 64);
        score.resize(size_t(c.intermediate_size));
        candidates.resize(size_t(c.intermediate_size));
        n_candidates.resize(kSegments);
        partial.resize(size_t(kSegments) * size_t(round_up(c.hidden_size, 64)));
    }

    // per-thread scratch, for the longest context seen
    void prepare(const Config& c, int n_ctx, int n_threads, const Kernels& kernels) {
        const size_t n = size_t(n_threads);
        scores.resize(n), heads.resize(n), scratch.resize(n);
        active.resize(std::max(active.size(), n * 6 + kSegments));
        for (auto& s : scores) s.resize(std::max(s.size(), size_t(c.group()) * size_t(n_ctx)));
        for (auto& h : heads) h.resize(size_t(2 * c.group() * c.padded_head()));
        for (auto& s : scratch) s.resize(kernels.gemm_scratch_bytes());
    }

    void resize_batch(const Config& c, int m, const Kernels& kernels) {
        const int panel = kernels.panel;
        const size_t rows = size_t(round_up(m, kernels.token_tile));
        ldq = round_up(c.q_size(), panel);
        ldkv = round_up(c.kv_size(), panel);
        ldff = round_up(c.intermediate_size, panel);
        ldd = round_up(c.hidden_size, panel);
        bx.resize(rows * size_t(c.hidden_size));
        bnorm.resize(rows * size_t(c.hidden_size));
        battn.resize(rows * size_t(c.q_size()));
        bq.resize(rows * size_t(ldq));
        bk.resize(rows * size_t(ldkv));
        bv.resize(rows * size_t(ldkv));
        bgate.resize(rows * size_t(ldff));
        bup.resize(rows * size_t(ldff));
        bout.resize(rows * size_t(ldd));
    }

    std::vector<float> x, q, k, v, up, partial;
    std::vector<float> cos, sin;  // [tokens of this call][head_dim / 2]
    ActBuffer in, attn, hidden;
    // predicted mode: the residual stream, what fc1 makes of it, signs, scores and the candidates by segment
    ActBuffer residual, predictor;
    std::vector<uint64_t> signs;
    std::vector<float> score;
    std::vector<int> candidates;
    std::vector<uint64_t> n_candidates;             // per segment
    std::vector<uint64_t> active;                   // per item of an FFN job
    std::vector<std::vector<float>> scores, heads;  // per thread
    // prefill: one row per token, leading dimensions padded to whole gemm panels
    int ldq = 0, ldkv = 0, ldff = 0, ldd = 0;
    Batch bx, bnorm, bq, bk, bv, battn, bgate, bup, bout, blogits;
    std::vector<uint8_t> packed_a;
    std::vector<std::vector<uint8_t>> scratch;  // per thread
};

}  // namespace prosparse
