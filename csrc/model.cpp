// Loading: tensors in, packed weights out.
#include "model.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "dispatch.h"
#include "pack.h"
#include "workspace.h"

namespace prosparse {
namespace {

constexpr size_t kHuge = 2u << 20;
constexpr size_t kSlab = 4u << 20;  // file bytes packed before their pages are dropped

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

uint8_t* map_pages(size_t bytes) {
    void* p = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    // trim to a 2 MB boundary so that every page of the block can be a huge one
    auto start = reinterpret_cast<uintptr_t>(p), aligned = (start + kHuge - 1) / kHuge * kHuge;
    if (aligned > start) munmap(p, aligned - start);
    if (start + kHuge > aligned) munmap(reinterpret_cast<void*>(aligned + bytes), start + kHuge - aligned);
#ifdef MADV_HUGEPAGE
    madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);
#endif
    return reinterpret_cast<uint8_t*>(aligned);
}

std::vector<float> floats(const std::string& name, const Source& s, int n) {
    if (s.shape != std::vector<int64_t>{n}) fail(name + ": expected shape (" + std::to_string(n) + ",)");
    if (s.type != Type::f32) fail(name + ": one-dimensional tensors must be F32");
    if (s.bytes != size_t(n) * 4) fail(name + ": data does not match its shape");
    std::vector<float> out(static_cast<size_t>(n));
    std::memcpy(out.data(), s.data, s.bytes);
    return out;
}

}  // namespace

Arena::~Arena() {
    for (auto& c : chunks_) munmap(c.data, c.size);
}

uint8_t* Arena::allocate(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (chunks_.empty() || chunks_.back().size - chunks_.back().used < bytes) {
        size_t size = (std::max(bytes, size_t(256) << 20) + kHuge - 1) / kHuge * kHuge;
        chunks_.push_back({map_pages(size), size, 0});
    }
    Chunk& c = chunks_.back();
    uint8_t* p = c.data + c.used;
    c.used += bytes;
    used_ += bytes;
    return p;
}

void Arena::release(const uint8_t* p, size_t bytes) {
    used_ -= (bytes + 63) / 64 * 64;
    // whole huge pages only: breaking one up would slow what else lies on it
    const auto start = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
    const auto end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHuge * kHuge;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
}

Cache::Cache(const Config& config, int n_ctx)
    : n_ctx(n_ctx),
      layers_(config.num_hidden_layers),
      heads_(config.num_key_value_heads),
      stride_(config.padded_head()) {
    if (n_ctx < 1) fail("n_ctx must be at least 1, got " + std::to_string(n_ctx));
    size_ = 2 * at(layers_, 0);
    // untouched pages stay unbacked: a long context costs memory only as it fills
    void* p =
        mmap(nullptr, size_ * 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint16_t*>(p);
}

Cache::~Cache() { munmap(data_, size_ * 2); }

Model::Model(Config c, int n_threads, Mode mode)
    : config(std::move(c)),
      mode(mode),
      skipping(mode != Mode::dense),
      predicting(mode == Mode::predicted),
      k_(kernels()) {
    set_threads(n_threads);
    layers_.resize(size_t(config.num_hidden_layers));
    ws_ = std::make_shared<Workspace>(config);
}

void Model::set_threads(int n) {
    if (n < 1 || n > 1024) fail("n_threads must be between 1 and 1024, got " + std::to_string(n));
    std::lock_guard lock(busy_);
    pool_ = std::make_unique<Pool>(n);
}

void Model::release(const Source& s, size_t first, size_t last) {
    if (!s.mapped) return;
    const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
    const auto start = (reinterpret_cast<uintptr_t>(s.data) + first + page - 1) / page * page;
    const auto end = (reinterpret_cast<uintptr_t>(s.data) + last) / page * page;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
}

Matrix Model::pack(const Source& s, int rows, int cols) {
    const size_t stride = row_bytes(s.type, cols), src_row = file_row_bytes(s.type, cols);
    uint8_t* data = arena_.allocate(stride * size_t(rows));
    const int step = 64;
    const int slab = step * std::max(1, int(kSlab / (src_row * step)));
    for (int r0 = 0; r0 < rows; r0 += slab) {  // an embedding is never twice in memory
        const int r1 = std::min(rows, r0 + slab);
        pool_->run((r1 - r0 + step - 1) / step, [&](int item, int) {
            for (int r = r0 + item * step; r < std::min(r1, r0 + (item + 1) * step); r++)
                pack_row(s.type, s.data + size_t(r) * src_row, cols, data + size_t(r) * stride);
        });
        release(s, size_t(r0) * src_row, size_t(r1) * src_row);
    }
    return {s.type, rows, cols, data, stride};
}

void Model::pack_neurons(Layer& layer) {
    const Source &up = layer.up_source, &down = layer.down_source;
    const int count = config.intermediate_size, width = config.hidden_size;
    Neurons& n = layer.neurons;
    n.up_type = up.type;
    n.down_type = down.type;
    n.count = count;
    n.width = width;
    n.down_offset = row_bytes(up.type, width);
    n.record = n.down_offset + (code_bytes(down.type, width) + 15) / 16 * 16;
    const int groups = (count + kGroup - 1) / kGroup;
    n.scale_stride = quantized(down.type) ? size_t(round_up(width, 64)) * (has_min(down.type) ? 4 : 2) : 0;
    uint8_t* records = arena_.allocate(n.record * size_t(count));
    uint8_t* scales = arena_.allocate(n.scale_stride * size_t(groups));
    n.records = records;
    n.scales = scales;
    const size_t src_row = file_row_bytes(up.type, width);
    pool_->run(groups, [&](int g, int) {
        for (int j = g * kGroup; j < std::min(count, (g + 1) * kGroup); j++)
            pack_row(up.type, up.data + size_t(j) * src_row, width, records + size_t(j) * n.record);
        pack_down_group(down.type, down.data, width, count, g,
                        records + size_t(g) * kGroup * n.record + n.down_offset, n.record,
                        scales + size_t(g) * n.scale_stride);
    });
    release(up, 0, up.bytes);
    release(down, 0, down.bytes);
    layer.up_source = layer.down_source = {};
}

void Model::leave_exact() {
    for (Layer& l : layers_) {
        const Neurons n = l.neurons;
        auto matrix = [&](Type type, int rows, int cols, uint8_t** data) {
            const size_t stride = row_bytes(type, cols);
            *data = arena_.allocate(stride * size_t(rows));
            return Matrix{type, rows, cols, *data, stride};
        };
        uint8_t *up, *down;
        l.up = matrix(n.up_type, n.count, n.width, &up);
        l.down = matrix(n.down_type, n.width, n.count, &down);
        pool_->run((n.count + kGroup - 1) / kGroup, [&](int g, int) {
            for (int j = g * kGroup; j < std::min(n.count, (g + 1) * kGroup); j++)
                std::memcpy(up + size_t(j) * l.up.stride, n.up(j), l.up.stride);
        });
        pool_->run(round_up(n.width, 64) / 64, [&](int chunk, int) {
            unpack_down_rows(n, chunk, down + size_t(chunk) * 64 * l.down.stride, l.down.stride);
        });
        arena_.release(n.records, n.record * size_t(n.count));
        arena_.release(n.scales, n.scale_stride * size_t((n.count + kGroup - 1) / kGroup));
        l.neurons = {};
    }
    skipping = false;
}

void Model::set_tensor(const std::string& name, Source s) {
    std::lock_guard lock(busy_);
    const Config& c = config;
    auto check = [&](int rows, int cols) {
        if (s.shape != std::vector<int64_t>{rows, cols})
            fail(name + ": expected shape (" + std::to_string(rows) + ", " + std::to_string(cols) + ")");
        if (quantized(s.type) && cols % 32) fail(name + ": quantised rows need a multiple of 32 columns");
        if (s.bytes != file_row_bytes(s.type, cols) * size_t(rows))
            fail(name + ": data does not match its shape");
    };
    auto matrix = [&](Matrix& m, int rows, int cols) {
        check(rows, cols);
        m = pack(s, rows, cols);
    };
    if (name == "model.embed_tokens.weight") return matrix(embed_, c.vocab_size, c.hidden_size);
    if (name == "lm_head.weight") return matrix(head_, c.vocab_size, c.hidden_size);
    if (name == "model.norm.weight") {
        final_norm_ = floats(name, s, c.hidden_size);
        return;
    }
    const std::string prefix = "model.layers.";
    const size_t dot = name.find('.', prefix.size());
    if (name.compare(0, prefix.size(), prefix) != 0 || dot == std::string::npos)
        fail("unknown tensor " + name);
    const std::string number = name.substr(prefix.size(), dot - prefix.size()), rest = name.substr(dot + 1);
    if (number.empty() || number.size() > 6 || number.find_first_not_of("0123456789") != std::string::npos ||
        std::stoi(number) >= c.num_hidden_layers)
        fail("unknown tensor " + name);
    Layer& l = layers_[size_t(std::stoi(number))];
    const int d = c.hidden_size, ff = c.intermediate_size;
    if (rest == "input_layernorm.weight")
        l.attn_norm = floats(name, s, d);
    else if (rest == "post_attention_layernorm.weight")
        l.ffn_norm = floats(name, s, d);
    else if (rest == "self_attn.q_norm.weight" && c.qk_norm)
        l.q_norm = floats(name, s, c.head_dim);
    else if (rest == "self_attn.k_norm.weight" && c.qk_norm)
        l.k_norm = floats(name, s, c.head_dim);
    else if (rest == "self_attn.q_proj.bias")
        l.q_bias = floats(name, s, c.q_size());
    else if (rest == "self_attn.k_proj.bias")
        l.k_bias = floats(name, s, c.kv_size());
    else if (rest == "self_attn.v_proj.bias")
        l.v_bias = floats(name, s, c.kv_size());
    else if (rest == "self_attn.q_proj.weight")
        matrix(l.q, c.q_size(), d);
    else if (rest == "self_attn.k_proj.weight")
        matrix(l.k, c.kv_size(), d);
    else if (rest == "self_attn.v_proj.weight")
        matrix(l.v, c.kv_size(), d);
    else if (rest == "self_attn.o_proj.weight")
        matrix(l.o, d, c.q_size());
    else if (rest == "mlp.gate_proj.weight")
        matrix(l.gate, ff, d);
    else if (rest == "predictor.fc1.weight" && mode == Mode::predicted) {
        if (s.shape.size() != 2 || s.shape[0] < 1 || s.shape[0] > 1 << 20)
            fail(name + ": expected shape (rank, " + std::to_string(d) + ")");
        matrix(l.predictor.fc1, int(s.shape[0]), d);
    } else if (rest == "predictor.fc2.weight" && mode == Mode::predicted) {
        if (!l.predictor.fc1.data) fail(name + ": fc1 must come first");
        matrix(l.predictor.score, ff, l.predictor.fc1.rows);
    } else if (rest == "predictor.sketch.weight" && mode == Mode::predicted)
        matrix(l.predictor.score, ff, d);
    else if (rest == "mlp.up_proj.weight" && !skipping)
        matrix(l.up, ff, d);
    else if (rest == "mlp.down_proj.weight" && !skipping)
        matrix(l.down, d, ff);
    else if (rest == "mlp.up_proj.weight" || rest == "mlp.down_proj.weight") {
        const bool up = rest == "mlp.up_proj.weight";
        up ? check(ff, d) : check(d, ff);
        (up ? l.up_source : l.down_source) = std::move(s);
        if (l.up_source.data && l.down_source.data) pack_neurons(l);
    } else
        fail("unknown tensor " + name);
}

void Model::set_predictor(const std::string& kind, bool residual, const std::vector<float>& thresholds) {
    if (mode != Mode::predicted) fail("only predicted mode takes a predictor");
    if (thresholds.size() != layers_.size())
        fail(std::to_string(thresholds.size()) + " thresholds for " + std::to_string(layers_.size()) +
             " layers");
    using Kind = Predictor::Kind;
    const Kind k = kind == "lowrank"  ? Kind::lowrank
                   : kind == "sketch" ? Kind::sketch
                   : kind == "sign"   ? Kind::sign
                                      : Kind::none;
    if (k == Kind::none) fail("unknown predictor " + kind);
    if (residual && k != Kind::lowrank) fail("a " + kind + " predictor sees what the gate sees");
    std::lock_guard lock(busy_);
    for (size_t i = 0; i < layers_.size(); i++) {
        if (!std::isfinite(thresholds[i])) fail("thresholds must be finite");
        Predictor& p = layers_[i].predictor;
        p.kind = k, p.residual = residual, p.threshold = thresholds[i];
    }
}

void Model::finish_predictor(Layer& l, const std::string& prefix) {
    Predictor& p = l.predictor;
    if (p.kind == Predictor::Kind::none) fail("predicted mode needs a predictor");
    if (p.kind != Predictor::Kind::sign) {
        const bool lowrank = p.kind == Predictor::Kind::lowrank;
        const int cols = lowrank ? p.fc1.rows : config.hidden_size;
        if (!p.score.data || (lowrank && !p.fc1.data) || p.score.cols != cols)
            fail("missing tensor " + prefix + (lowrank ? "predictor.fc2.weight" : "predictor.sketch.weight"));
        return;
    }
    const size_t words = size_t(config.hidden_size + 63) / 64;
    p.signs.assign(words * size_t(config.intermediate_size), 0);
    std::vector<float> row(static_cast<size_t>(config.hidden_size));
    for (int j = 0; j < config.intermediate_size; j++) {
        k_.dequantize(l.gate.type, l.gate.row(j), config.hidden_size, row.data());
        sign_bits(row.data(), config.hidden_size, &p.signs[size_t(j) * words]);
    }
}

void Model::finish() {
    auto need = [](bool there, const std::string& name) {
        if (!there) fail("missing tensor " + name);
    };
    need(embed_.data, "model.embed_tokens.weight");
    need(!final_norm_.empty(), "model.norm.weight");
    if (!head_.data) head_ = embed_;
    for (size_t i = 0; i < layers_.size(); i++) {
        const Layer& l = layers_[i];
        const std::string p = "model.layers." + std::to_string(i) + ".";
        need(!l.attn_norm.empty(), p + "input_layernorm.weight");
        need(!l.ffn_norm.empty(), p + "post_attention_layernorm.weight");
        need(l.q.data, p + "self_attn.q_proj.weight");
        need(l.k.data, p + "self_attn.k_proj.weight");
        need(l.v.data, p + "self_attn.v_proj.weight");
        need(l.o.data, p + "self_attn.o_proj.weight");
        need(l.gate.data, p + "mlp.gate_proj.weight");
        need(l.up.data || l.neurons.records || l.up_source.data, p + "mlp.up_proj.weight");
        need(l.down.data || l.neurons.records, p + "mlp.down_proj.weight");
        need(l.neurons.records || l.up.data, p + "mlp.up_proj.weight");
        need(!config.qk_norm || (!l.q_norm.empty() && !l.k_norm.empty()), p + "self_attn.q_norm.weight");
        if (mode == Mode::predicted) finish_predictor(layers_[i], p);
    }
}

}  // namespace prosparse
