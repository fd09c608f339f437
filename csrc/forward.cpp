// The forward pass: decode (one token, bound by reading weights) and prefill (many tokens, bound by
// arithmetic). Work is split by rows, heads or fixed segments, never by how many threads there are, so
// results are bit-equal for every thread count.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "model.h"
#include "workspace.h"

namespace prosparse {
namespace {

// Enough items for the threads to balance, each still a long sequential read.
int items_for(size_t bytes, int n_threads) {
    const size_t by_size = bytes / (24 << 10);
    return int(std::clamp<size_t>(by_size, 1, n_threads == 1 ? 1 : size_t(n_threads) * 6));
}

// Skipping pays while active neurons, read and computed one by one, cost less than all of them in one stream.
constexpr double kDenseAbove = 0.40;
constexpr int kDenseTokens = 16;  // in a row, before the layout is given up

}  // namespace

void Model::embed(int32_t token, float* out) {
    k_.dequantize(embed_.type, embed_.row(token), embed_.cols, out);
    if (config.embedding_scale != 1.0f)
        for (int i = 0; i < config.hidden_size; i++) out[i] *= config.embedding_scale;
}

uint64_t Model::project(std::initializer_list<Part> parts, const Acts& x, float scale, bool accumulate) {
    int rows = 0;
    size_t bytes = 0;
    for (const Part& p : parts) rows += p.w->rows, bytes += p.w->stride * size_t(p.w->rows);
    const int items = items_for(bytes, n_threads());
    pool_->run(items, [&](int k, int) {
        const int item = in_stream(k, items, n_threads());
        int first = int(int64_t(rows) * item / items), last = int(int64_t(rows) * (item + 1) / items);
        for (const Part& p : parts) {
            const int r0 = std::max(first, 0), r1 = std::min(last, p.w->rows);
            if (r0 < r1 && !accumulate) {
                k_.matvec(p.w, r0, r1, &x, p.out + r0);
                if (p.bias)
                    for (int r = r0; r < r1; r++) p.out[r] += p.bias[r];
            } else {
                float tile[64];
                for (int r = r0; r < r1; r += 64) {
                    const int n = std::min(64, r1 - r);
                    k_.matvec(p.w, r, r + n, &x, tile);
                    k_.add(p.out + r, tile, scale, n);
                }
            }
            first -= p.w->rows, last -= p.w->rows;
        }
    });
    return bytes;
}

void Model::rope_angles(int position, int n) {
    const size_t half = size_t(config.head_dim / 2);
    ws_->cos.resize(half * size_t(n));
    ws_->sin.resize(half * size_t(n));
    for (size_t i = 0; i < half * size_t(n); i++) {
        const float angle = float(position + int(i / half)) * config.inv_freq[i % half];
        ws_->cos[i] = std::cos(angle) * config.rope_attention_factor;
        ws_->sin[i] = std::sin(angle) * config.rope_attention_factor;
    }
}

void Model::rotate(float* x, int heads, int index, const std::vector<float>& norm) {
    const int hd = config.head_dim;
    const size_t at = size_t(index) * size_t(hd / 2);
    for (int h = 0; h < heads; h++) {
        float* v = x + size_t(h) * size_t(hd);
        if (!norm.empty()) k_.rmsnorm(v, norm.data(), hd, config.rms_norm_eps, v);
        k_.rope(v, &ws_->cos[at], &ws_->sin[at], hd);
    }
}

void Model::attend(Cache& cache, int index, int first, int heads, int n, const float* queries, float* results,
                   int thread) {
    const int hd = config.head_dim, pad = config.padded_head(), kv = first / config.group();
    auto& head = ws_->heads[size_t(thread)];  // zero-padded queries, then outputs
    float *q = head.data(), *out = q + config.group() * pad;
    for (int h = 0; h < heads; h++)
        std::memcpy(q + h * pad, queries + size_t((first + h) * hd), size_t(hd) * 4);
    AttendArgs a{q,
                 cache.k(index, kv),
                 cache.v(index, kv),
                 heads,
                 n,
                 pad,
                 pad,
                 pad,
                 1.0f / std::sqrt(float(hd)),
                 ws_->scores[size_t(thread)].data(),
                 out};
    k_.attend(&a);
    for (int h = 0; h < heads; h++)
        std::memcpy(results + size_t((first + h) * hd), out + h * pad, size_t(hd) * 4);
}

void Model::attend_token(Layer& l, int index, Cache& cache) {
    Workspace& w = *ws_;
    const Config& c = config;
    const int hd = c.head_dim, pad = c.padded_head(), pos = cache.n_past;
    rotate(w.q.data(), c.num_attention_heads, 0, l.q_norm);
    rotate(w.k.data(), c.num_key_value_heads, 0, l.k_norm);
    for (int h = 0; h < c.num_key_value_heads; h++) {
        k_.to_half(&w.k[size_t(h * hd)], hd, cache.k(index, h) + size_t(pos) * size_t(pad));
        k_.to_half(&w.v[size_t(h * hd)], hd, cache.v(index, h) + size_t(pos) * size_t(pad));
    }
    // query heads of one KV head together, unless threads would have nothing to do
    int heads = c.group();
    while (heads > 1 && (c.group() % heads || c.num_attention_heads / heads < 2 * n_threads())) heads--;
    const int items = c.num_attention_heads / heads;
    pool_->run(items, [&](int i, int thread) {
        const int first = in_stream(i, items, n_threads()) * heads;
        attend(cache, index, first, heads, pos + 1, w.q.data(), w.attn.acts.f, thread);
    });
    k_.quantize(w.attn.acts.f, c.q_size(), &w.attn.acts);
}

void Model::ffn_dense(Layer& l) {
    Workspace& w = *ws_;
    const int ff = config.intermediate_size;
    const size_t bytes = (l.gate.stride + l.up.stride) * size_t(ff);
    const int step = 64, blocks = (ff + step - 1) / step;  // whole quantisation chunks
    const int items = std::min(blocks, items_for(bytes, n_threads()));
    std::vector<uint64_t>& active = w.active;
    pool_->run(items, [&](int k, int) {
        const int item = in_stream(k, items, n_threads());
        const int j0 = int(int64_t(blocks) * item / items) * step;
        const int j1 = std::min(ff, int(int64_t(blocks) * (item + 1) / items) * step);
        float* h = w.hidden.acts.f + j0;
        k_.matvec(&l.gate, j0, j1, &w.in.acts, h);
        k_.matvec(&l.up, j0, j1, &w.in.acts, &w.up[size_t(j0)]);
        k_.activate(config.hidden_act, config.hidden_act_param, h, j1 - j0, h);
        uint64_t n = 0;
        for (int j = 0; j < j1 - j0; j++) n += h[j] != 0.0f;
        k_.multiply(&w.up[size_t(j0)], j1 - j0, h);
        Acts part = w.hidden.slice(j0, j1 - j0);
        k_.quantize(h, j1 - j0, &part);
        active[size_t(item)] = n;
    });
    stats.decode_bytes += bytes;
    for (int i = 0; i < items; i++) stats.decode_active += active[size_t(i)];
    stats.decode_bytes +=
        project({{&l.down, w.x.data(), nullptr}}, w.hidden.acts, config.residual_scale, true);
}

// Gate rows of a group stream in while the up and down rows of the group before, whose active neurons are
// known, are requested line by line: the scattered reads hide behind the sequential one.
uint64_t Model::ffn_segment(const Neurons& n, const Matrix& gate, int first, int last, float* y) {
    const Acts& x = ws_->in.acts;
    std::memset(y, 0, size_t(round_up(n.width, 64)) * 4);
    int pending[kGroup], n_pending = 0;
    float act[kGroup], x1[kGroup];
    const uint8_t* rows[kGroup];
    Wanted wanted(gate.stride);
    uint64_t active = 0;
    for (int g = first; g <= last; g++) {
        const int j0 = g * kGroup, count = g < last ? std::min(kGroup, n.count - j0) : 0;
        float pre[kGroup];
        const int half = count / 2;
        for (int r = 0; r < half; r++) {
            const uint8_t* beside = wanted.due(r + 1, half) ? wanted.next(nullptr) : nullptr;
            const uint8_t* other = wanted.due(r + 1, half) ? wanted.next(nullptr) : beside;
            k_.dot_two(&gate, j0 + r, half, &x, beside, other, pre + r);
        }
        if (count % 2) k_.matvec(&gate, j0 + count - 1, j0 + count, &x, pre + count - 1);
        wanted.finish();
        for (int i = 0; i < n_pending; i++) {
            const uint8_t* up = n.up(pending[i]);  // nothing else is wanted yet
            x1[i] = act[i] * k_.dot(n.up_type, up, n.width, &x, up, up);
            rows[i] = n.down(pending[i]);
        }
        if (n_pending) k_.down(n.down_type, rows, x1, n_pending, n.group_scales(g - 1), n.width, y);
        n_pending = 0;
        if (count) k_.activate(config.hidden_act, config.hidden_act_param, pre, count, pre);
        for (int r = 0; r < count; r++) {
            if (pre[r] == 0.0f) continue;
            pending[n_pending] = j0 + r;
            act[n_pending++] = pre[r];
            wanted.add(n.up(j0 + r), n.record);
        }
        if (n_pending) wanted.add(n.group_scales(g), n.scale_stride);
        active += uint64_t(n_pending);
    }
    return active;
}

void Model::ffn_exact(Layer& l) {
    Workspace& w = *ws_;
    const Neurons& n = l.neurons;
    const int groups = (n.count + kGroup - 1) / kGroup, width = round_up(n.width, 64);
    const int segments = std::min(kSegments, groups);
    pool_->run(segments, [&](int k, int) {
        const int s = in_stream(k, segments, n_threads());
        w.active[size_t(s)] = ffn_segment(n, l.gate, groups * s / segments, groups * (s + 1) / segments,
                                          &w.partial[size_t(s) * size_t(width)]);
    });
    uint64_t active = 0;
    for (int s = 0; s < segments; s++) {
        active += w.active[size_t(s)];
        k_.add(w.x.data(), &w.partial[size_t(s) * size_t(width)], config.residual_scale, n.width);
    }
    stats.decode_active += active;
    stats.decode_bytes +=
        l.gate.stride * size_t(n.count) + n.record * active + n.scale_stride * size_t(groups);
    const double density = double(active) / n.count;
    density_ = density_ < 0 ? density : density_ + (density - density_) * 0.01;
}

void Model::decode(Cache& cache, int32_t token, const std::function<bool()>& interrupted, bool& stopped) {
    Workspace& w = *ws_;
    const Config& c = config;
    embed(token, w.x.data());
    rope_angles(cache.n_past, 1);
    stats.decode_bytes += embed_.stride;
    for (size_t i = 0; i < layers_.size(); i++) {
        if (i % 8 == 0 && (stopped = interrupted())) return;
        Layer& l = layers_[i];
        k_.rmsnorm(w.x.data(), l.attn_norm.data(), c.hidden_size, c.rms_norm_eps, w.in.acts.f);
        k_.quantize(w.in.acts.f, c.hidden_size, &w.in.acts);
        stats.decode_bytes += project({{&l.q, w.q.data(), l.q_bias.empty() ? nullptr : l.q_bias.data()},
                                       {&l.k, w.k.data(), l.k_bias.empty() ? nullptr : l.k_bias.data()},
                                       {&l.v, w.v.data(), l.v_bias.empty() ? nullptr : l.v_bias.data()}},
                                      w.in.acts, 1.0f, false);
        attend_token(l, int(i), cache);
        stats.decode_bytes += project({{&l.o, w.x.data(), nullptr}}, w.attn.acts, c.residual_scale, true);
        k_.rmsnorm(w.x.data(), l.ffn_norm.data(), c.hidden_size, c.rms_norm_eps, w.in.acts.f);
        k_.quantize(w.in.acts.f, c.hidden_size, &w.in.acts);
        predicting ? ffn_predicted(l) : skipping ? ffn_exact(l) : ffn_dense(l);
    }
    // a model with predictors keeps the layout that they need
    dense_tokens_ = mode == Mode::exact && skipping && density_ > kDenseAbove ? dense_tokens_ + 1 : 0;
}

uint64_t Model::logits_of(const float* x, int m, float* out) {
    Workspace& w = *ws_;
    const Config& c = config;
    const float inv = 1.0f / c.logit_scale;
    if (m == 1) {
        k_.rmsnorm(x, final_norm_.data(), c.hidden_size, c.rms_norm_eps, w.in.acts.f);
        if (inv != 1.0f)
            for (int i = 0; i < c.hidden_size; i++) w.in.acts.f[i] *= inv;
        k_.quantize(w.in.acts.f, c.hidden_size, &w.in.acts);
        return project({{&head_, out, nullptr}}, w.in.acts, 1.0f, false);
    }
    const int d = c.hidden_size, ldc = round_up(c.vocab_size, k_.panel);
    w.blogits.resize(size_t(round_up(m, k_.token_tile)) * size_t(ldc));
    for (int i = 0; i < m; i++) {
        float* row = &w.bnorm[size_t(i) * size_t(d)];
        k_.rmsnorm(x + size_t(i) * size_t(d), final_norm_.data(), d, c.rms_norm_eps, row);
        if (inv != 1.0f)
            for (int j = 0; j < d; j++) row[j] *= inv;
    }
    gemm(head_, w.bnorm.data(), m, d, w.blogits.data(), ldc);
    for (int i = 0; i < m; i++)
        std::memcpy(out + size_t(i) * size_t(c.vocab_size), &w.blogits[size_t(i) * size_t(ldc)],
                    size_t(c.vocab_size) * 4);
    return head_.stride * size_t(head_.rows);
}

// Packs A once, then hands out panels of outputs.
void Model::gemm(const Matrix& m, const float* x, int n, int ldx, float* c, int ldc) {
    pack_a(m.type, x, n, m.cols, ldx);
    pool_->run((m.rows + k_.panel - 1) / k_.panel, [&](int panel, int thread) {
        k_.gemm(&m, panel, ws_->packed_a.data(), n, c, ldc, ws_->scratch[size_t(thread)].data());
    });
}

void Model::pack_a(Type type, const float* x, int n, int cols, int ldx) {
    auto& a = ws_->packed_a;
    const size_t tile_bytes = k_.gemm_a_bytes(type, k_.token_tile, cols);
    const int tiles = (n + k_.token_tile - 1) / k_.token_tile;
    a.resize(std::max(a.size(), tile_bytes * size_t(tiles)));
    pool_->run(tiles, [&](int t, int) {
        const int i = t * k_.token_tile;
        k_.gemm_pack_a(type, x + size_t(i) * size_t(ldx), std::min(k_.token_tile, n - i), cols, ldx,
                       a.data() + tile_bytes * size_t(t));
    });
}

void Model::attend_batch(Layer& l, int index, Cache& cache, int m) {
    Workspace& w = *ws_;
    const Config& c = config;
    const int hd = c.head_dim, pad = c.padded_head(), group = c.group(), past = cache.n_past;
    pool_->run(m, [&](int i, int) {
        float* q = &w.bq[size_t(i) * size_t(w.ldq)];
        float* k = &w.bk[size_t(i) * size_t(w.ldkv)];
        float* v = &w.bv[size_t(i) * size_t(w.ldkv)];
        for (size_t j = 0; j < l.q_bias.size(); j++) q[j] += l.q_bias[j];
        for (size_t j = 0; j < l.k_bias.size(); j++) k[j] += l.k_bias[j];
        for (size_t j = 0; j < l.v_bias.size(); j++) v[j] += l.v_bias[j];
        rotate(q, c.num_attention_heads, i, l.q_norm);
        rotate(k, c.num_key_value_heads, i, l.k_norm);
        for (int h = 0; h < c.num_key_value_heads; h++) {
            const size_t at = size_t(past + i) * size_t(pad);
            k_.to_half(k + h * hd, hd, cache.k(index, h) + at);
            k_.to_half(v + h * hd, hd, cache.v(index, h) + at);
        }
    });
    pool_->run(m * c.num_key_value_heads, [&](int item, int thread) {
        const int i = item / c.num_key_value_heads, kv = item % c.num_key_value_heads;
        attend(cache, index, kv * group, group, past + i + 1, &w.bq[size_t(i) * size_t(w.ldq)],
               &w.battn[size_t(i) * size_t(c.q_size())], thread);
    });
}

void Model::ffn_batch(Layer& l, int m) {
    Workspace& w = *ws_;
    const int ff = config.intermediate_size, d = config.hidden_size;
    const Matrix up = skipping ? l.neurons.up() : l.up;
    if (l.gate.type != up.type) throw std::invalid_argument("gate_proj and up_proj must have the same type");
    pack_a(up.type, w.bnorm.data(), m, d, d);
    const int panels = (ff + k_.panel - 1) / k_.panel;
    w.active.resize(std::max(w.active.size(), size_t(panels)));
    pool_->run(panels, [&](int p, int thread) {
        void* scratch = w.scratch[size_t(thread)].data();
        k_.gemm(&l.gate, p, w.packed_a.data(), m, w.bgate.data(), w.ldff, scratch);
        k_.gemm(&up, p, w.packed_a.data(), m, w.bup.data(), w.ldff, scratch);
        uint64_t active = 0;
        for (int i = 0; i < m; i++) {
            const size_t at = size_t(i) * size_t(w.ldff) + size_t(p * k_.panel);
            const int n = std::min(k_.panel, ff - p * k_.panel);
            k_.activate(config.hidden_act, config.hidden_act_param, &w.bgate[at], n, &w.bgate[at]);
            for (int j = 0; j < n; j++) active += w.bgate[at + size_t(j)] != 0.0f;
            k_.multiply(&w.bup[at], n, &w.bgate[at]);
        }
        w.active[size_t(p)] = active;
    });
    for (int p = 0; p < panels; p++) stats.prefill_active += w.active[size_t(p)];
    if (!skipping) {
        gemm(l.down, w.bgate.data(), m, w.ldff, w.bout.data(), w.ldd);
    } else {
        pack_a(l.neurons.down_type, w.bgate.data(), m, ff, w.ldff);
        pool_->run((d + k_.panel - 1) / k_.panel, [&](int p, int thread) {
            k_.gemm_down(&l.neurons, p, w.packed_a.data(), m, w.bout.data(), w.ldd,
                         w.scratch[size_t(thread)].data());
        });
    }
}

uint64_t Model::layer_bytes(const Layer& l) const {
    auto bytes = [](const Matrix& m) { return m.stride * size_t(m.rows); };
    uint64_t total =
        bytes(l.q) + bytes(l.k) + bytes(l.v) + bytes(l.o) + bytes(l.gate) + bytes(l.up) + bytes(l.down);
    if (skipping) {
        const Neurons& n = l.neurons;
        total += n.record * size_t(n.count) + n.scale_stride * size_t((n.count + kGroup - 1) / kGroup);
    }
    return total;
}

void Model::prefill(Cache& cache, std::span<const int32_t> tokens, const std::function<bool()>& interrupted,
                    bool& stopped) {
    Workspace& w = *ws_;
    const Config& c = config;
    const int m = int(tokens.size()), d = c.hidden_size;
    w.resize_batch(c, m, k_);
    rope_angles(cache.n_past, m);
    auto norm = [&](const std::vector<float>& weight) {
        for (int i = 0; i < m; i++)
            k_.rmsnorm(&w.bx[size_t(i) * size_t(d)], weight.data(), d, c.rms_norm_eps,
                       &w.bnorm[size_t(i) * size_t(d)]);
    };
    auto add_out = [&] {
        for (int i = 0; i < m; i++)
            k_.add(&w.bx[size_t(i) * size_t(d)], &w.bout[size_t(i) * size_t(w.ldd)], c.residual_scale, d);
    };
    for (int i = 0; i < m; i++) embed(tokens[size_t(i)], &w.bx[size_t(i) * size_t(d)]);
    for (size_t i = 0; i < layers_.size(); i++) {
        if ((stopped = interrupted())) return;
        Layer& l = layers_[i];
        norm(l.attn_norm);
        gemm(l.q, w.bnorm.data(), m, d, w.bq.data(), w.ldq);
        gemm(l.k, w.bnorm.data(), m, d, w.bk.data(), w.ldkv);
        gemm(l.v, w.bnorm.data(), m, d, w.bv.data(), w.ldkv);
        attend_batch(l, int(i), cache, m);
        gemm(l.o, w.battn.data(), m, c.q_size(), w.bout.data(), w.ldd);
        add_out();
        norm(l.ffn_norm);
        ffn_batch(l, m);
        add_out();
        stats.prefill_bytes += layer_bytes(l);
    }
}

bool Model::forward(Cache& cache, std::span<const int32_t> tokens, bool all_logits, float* logits,
                    const std::function<bool()>& interrupted) {
    std::lock_guard lock(busy_);
    const int n = int(tokens.size());
    if (n == 0) throw std::invalid_argument("forward needs at least one token");
    for (int32_t t : tokens)
        if (t < 0 || t >= config.vocab_size)
            throw std::invalid_argument("token " + std::to_string(t) + " is outside the vocabulary of " +
                                        std::to_string(config.vocab_size));
    if (cache.n_past + n > cache.n_ctx)
        throw std::invalid_argument(std::to_string(cache.n_past + n) + " tokens do not fit the context of " +
                                    std::to_string(cache.n_ctx) + "; load with a larger n_ctx");
    if (cache.layers() != config.num_hidden_layers || cache.heads() != config.num_key_value_heads ||
        cache.stride() != config.padded_head())
        throw std::invalid_argument("this cache was made for another model");
    ws_->prepare(config, cache.n_ctx, n_threads(), k_);
    const int start = cache.n_past;
    bool stopped = false;
    if (n == 1) {
        if (dense_tokens_ >= kDenseTokens) leave_exact();
        decode(cache, tokens[0], interrupted, stopped);
        if (stopped) return false;
        stats.decode_bytes += logits_of(ws_->x.data(), 1, logits);
        cache.n_past++;
        stats.decode_tokens++;
        return true;
    }
    for (int at = 0; at < n; at += kBatch) {
        const int m = std::min(kBatch, n - at);
        prefill(cache, tokens.subspan(size_t(at), size_t(m)), interrupted, stopped);
        if (stopped) {
            cache.n_past = start;
            return false;
        }
        if (all_logits)
            stats.prefill_bytes +=
                logits_of(ws_->bx.data(), m, logits + size_t(at) * size_t(config.vocab_size));
        else if (at + m == n)
            stats.prefill_bytes += logits_of(&ws_->bx[size_t(m - 1) * size_t(config.hidden_size)], 1, logits);
        cache.n_past += m;
        stats.prefill_tokens += uint64_t(m);
    }
    return true;
}

}  // namespace prosparse
