// A decoder of the LLaMA family: packed weights, KV cache, forward pass.
#pragma once
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "pool.h"

namespace prosparse {

// Memory for weights on 2 MB pages where the kernel grants them: +10-20 % read bandwidth on one core.
class Arena {
  public:
    Arena() = default;
    ~Arena();
    Arena(const Arena&) = delete;
    uint8_t* allocate(size_t bytes);               // 64-byte aligned, not initialised
    void release(const uint8_t* p, size_t bytes);  // gives the pages of an allocation back
    size_t used() const { return used_; }

  private:
    struct Chunk {
        uint8_t* data;
        size_t size, used;
    };
    std::vector<Chunk> chunks_;
    size_t used_ = 0;
};

struct Config {
    int vocab_size, hidden_size, intermediate_size, num_hidden_layers;
    int num_attention_heads, num_key_value_heads, head_dim;
    float rms_norm_eps, embedding_scale, residual_scale, logit_scale, rope_attention_factor;
    ActFn hidden_act;
    float hidden_act_param;
    bool qk_norm;
    std::vector<float> inv_freq;  // [head_dim / 2]

    int group() const { return num_attention_heads / num_key_value_heads; }
    int q_size() const { return num_attention_heads * head_dim; }
    int kv_size() const { return num_key_value_heads * head_dim; }
    int padded_head() const { return round_up(head_dim, 16); }
    bool sparse() const {
        return hidden_act == ActFn::relu || hidden_act == ActFn::fatrelu || hidden_act == ActFn::shiftrelu;
    }
};

// A tensor as the caller holds it; `keep_alive` keeps its memory valid until it is packed.
struct Source {
    Type type;
    std::vector<int64_t> shape;
    const uint8_t* data = nullptr;
    size_t bytes = 0;
    bool mapped = false;  // a read-only file mapping: its pages are dropped once packed
    std::shared_ptr<void> keep_alive;
};

// Names the neurons that may be active before the gate is computed (src/prosparse/model/predictor.py).
struct Predictor {
    enum class Kind { none, lowrank, sketch, sign } kind = Kind::none;
    bool residual = false;        // sees the residual stream, not what the gate sees
    Matrix fc1{}, score{};        // lowrank: both; sketch: `score` is the copy of the gate
    std::vector<uint64_t> signs;  // of the gate's rows, a bit a column
    float threshold = 0;
};

struct Layer {
    std::vector<float> attn_norm, ffn_norm, q_norm, k_norm, q_bias, k_bias, v_bias;
    Matrix q{}, k{}, v{}, o{}, gate{}, up{}, down{};
    Neurons neurons{};  // exact and predicted mode: up and down live here
    Predictor predictor;
    Source up_source, down_source;
};

// Keys and values, f16, [layer][kv head][position][head_dim padded to 16].
class Cache {
  public:
    Cache(const Config& config, int n_ctx);
    ~Cache();
    Cache(const Cache&) = delete;
    int n_ctx, n_past = 0;
    uint16_t* k(int layer, int head) { return data_ + at(layer, head); }
    uint16_t* v(int layer, int head) { return data_ + size_ / 2 + at(layer, head); }
    size_t bytes() const { return size_ * 2; }
    int layers() const { return layers_; }
    int heads() const { return heads_; }
    int stride() const { return stride_; }

  private:
    size_t at(int layer, int head) const {
        return (size_t(layer) * size_t(heads_) + size_t(head)) * size_t(n_ctx) * size_t(stride_);
    }
    int layers_, heads_, stride_;
    size_t size_;
    uint16_t* data_;
};

// Counters since the last reset. A neuron counts once per token; bytes are weights only.
struct Stats {
    uint64_t decode_tokens = 0, decode_active = 0, decode_candidates = 0, decode_bytes = 0;
    uint64_t prefill_tokens = 0, prefill_active = 0, prefill_bytes = 0;
};

class Model {
  public:
    enum class Mode { exact, dense, predicted };
    Model(Config config, int n_threads, Mode mode);

    // Names are Hugging Face's. Throws std::invalid_argument for unknown names and shapes that do not fit.
    void set_tensor(const std::string& name, Source source);
    // One threshold a layer; may be called again to move them. Throws unless the mode is predicted.
    void set_predictor(const std::string& kind, bool residual, const std::vector<float>& thresholds);
    void finish();  // throws std::invalid_argument naming the first missing tensor

    // Appends tokens to the cache; writes logits of the last token, or of all, to `logits`.
    // `interrupted` is asked between layers; true leaves the cache as it was and returns false.
    bool forward(Cache& cache, std::span<const int32_t> tokens, bool all_logits, float* logits,
                 const std::function<bool()>& interrupted);

    const Config config;
    const Mode mode;
    Stats stats;
    bool skipping;    // exact mode, until measured density makes it a loss: then weights are laid out as in
                      // dense mode
    bool predicting;  // predicted mode; may be turned off and on, the layout is that of exact mode
    int n_threads() const { return pool_->n_threads(); }
    void set_threads(int n);
    size_t weight_bytes() const { return arena_.used(); }

  private:
    struct Part {  // rows of one projection
        const Matrix* w;
        float* out;
        const float* bias;
    };
    struct Workspace;

    Matrix pack(const Source& s, int rows, int cols);
    void finish_predictor(Layer& layer, const std::string& prefix);
    void pack_neurons(Layer& layer);
    void leave_exact();
    void release(const Source& s, size_t first, size_t last);  // of its bytes

    void decode(Cache& cache, int32_t token, const std::function<bool()>& interrupted, bool& stopped);
    // returns the bytes of weights read
    uint64_t project(std::initializer_list<Part> parts, const Acts& x, float scale, bool accumulate);
    // `heads` query heads from `first` on, of one KV head, over `n` tokens; `queries` and `results` are those
    // of all heads of a token
    void attend(Cache& cache, int index, int first, int heads, int n, const float* queries, float* results,
                int thread);
    void attend_token(Layer& layer, int index, Cache& cache);
    void ffn_dense(Layer& layer);
    void ffn_exact(Layer& layer);
    uint64_t ffn_segment(const Neurons& n, const Matrix& gate, int first_group, int last_group, float* y);
    void ffn_predicted(Layer& layer);
    uint64_t predict(const Layer& layer);  // the predictor's part that is common to all neurons
    void predicted_segment(const Layer& layer, int first_group, int last_group, float* y, int segment);

    void prefill(Cache& cache, std::span<const int32_t> tokens, const std::function<bool()>& interrupted,
                 bool& stopped);
    void pack_a(Type type, const float* x, int m, int cols, int ldx);
    void gemm(const Matrix& w, const float* x, int m, int ldx, float* c, int ldc);
    void attend_batch(Layer& layer, int index, Cache& cache, int m);
    void ffn_batch(Layer& layer, int m);
    void rope_angles(int position, int n);
    void rotate(float* x, int heads, int index, const std::vector<float>& norm);
    uint64_t layer_bytes(const Layer& layer) const;
    void embed(int32_t token, float* out);
    uint64_t logits_of(const float* x, int m, float* out);

    const Kernels& k_;
    std::unique_ptr<Pool> pool_;
    Arena arena_;
    std::mutex busy_;
    Matrix embed_{}, head_{};
    std::vector<float> final_norm_;
    std::vector<Layer> layers_;
    std::shared_ptr<Workspace> ws_;
    double density_ = -1;   // running mean over layers and tokens, decode
    int dense_tokens_ = 0;  // in a row that were too dense for skipping
};

}  // namespace prosparse
