// The Python module prosparse._core: one native call per token or per batch.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>

#include "codes.h"
#include "dispatch.h"
#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace prosparse {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const int16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
nb::ndarray<nb::numpy, T> array(std::vector<size_t> shape) {
    size_t n = 1;
    for (size_t s : shape) n *= s;
    T* data = new T[n];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner);
}

Type type_of(const std::string& name) {
    static const std::pair<const char*, Type> types[] = {
        {"F32", Type::f32},   {"F16", Type::f16},   {"BF16", Type::bf16}, {"Q8_0", Type::q8_0},
        {"Q5_1", Type::q5_1}, {"Q4_0", Type::q4_0}, {"Q4_1", Type::q4_1}};
    for (auto& [n, t] : types)
        if (name == n) return t;
    throw nb::value_error(("no kernels for tensor type " + name).c_str());
}

ActFn act_of(const std::string& name) {
    static const std::pair<const char*, ActFn> acts[] = {{"silu", ActFn::silu},
                                                         {"relu", ActFn::relu},
                                                         {"fatrelu", ActFn::fatrelu},
                                                         {"shiftrelu", ActFn::shiftrelu},
                                                         {"gelu", ActFn::gelu}};
    for (auto& [n, a] : acts)
        if (name == n) return a;
    throw nb::value_error(("unknown activation " + name).c_str());
}

Config config_of(const nb::dict& d) {
    auto get = [&]<class T>(const char* key, T) {
        if (!d.contains(key)) throw nb::value_error((std::string("config lacks ") + key).c_str());
        return nb::cast<T>(d[key]);
    };
    Config c{};
    c.vocab_size = get("vocab_size", int());
    c.hidden_size = get("hidden_size", int());
    c.intermediate_size = get("intermediate_size", int());
    c.num_hidden_layers = get("num_hidden_layers", int());
    c.num_attention_heads = get("num_attention_heads", int());
    c.num_key_value_heads = get("num_key_value_heads", int());
    c.head_dim = get("head_dim", int());
    c.rms_norm_eps = get("rms_norm_eps", float());
    c.embedding_scale = get("embedding_scale", float());
    c.residual_scale = get("residual_scale", float());
    c.logit_scale = get("logit_scale", float());
    c.rope_attention_factor = get("rope_attention_factor", float());
    c.hidden_act = act_of(get("hidden_act", std::string()));
    c.hidden_act_param = get("hidden_act_param", float());
    c.qk_norm = get("qk_norm", bool());
    c.inv_freq = get("inv_freq", std::vector<float>());
    for (int n : {c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers,
                  c.num_attention_heads, c.num_key_value_heads, c.head_dim})
        if (n < 1 || n > 1 << 26) throw nb::value_error("config sizes must be positive");
    if (c.num_attention_heads % c.num_key_value_heads)
        throw nb::value_error("num_attention_heads must be a multiple of num_key_value_heads");
    if (c.head_dim % 2 || c.head_dim > 1024) throw nb::value_error("head_dim must be even and at most 1024");
    if (c.inv_freq.size() != size_t(c.head_dim / 2))
        throw nb::value_error("inv_freq must have head_dim / 2 entries");
    return c;
}

void set_tensor(Model& m, const std::string& name, const std::string& type, std::vector<int64_t> shape,
                Bytes data, bool mapped) {
    Source s{type_of(type), std::move(shape), data.data(),
             data.size(),   mapped,           std::make_shared<Bytes>(data)};
    m.set_tensor(name, std::move(s));
}

nb::ndarray<nb::numpy, float> forward(Model& m, Cache& cache, Tokens tokens, bool all_logits) {
    const size_t n = tokens.shape(0);
    auto out = array<float>({all_logits ? n : 1, size_t(m.config.vocab_size)});
    bool done;
    {
        nb::gil_scoped_release release;
        done = m.forward(cache, {tokens.data(), n}, all_logits && n > 1, out.data(), [] {
            nb::gil_scoped_acquire acquire;
            return PyErr_CheckSignals() != 0;
        });
    }
    if (!done) throw nb::python_error();
    return out;
}

// The k largest logits, ties by lower id. One pass keeps a threshold, so most values cost one compare.
std::pair<nb::ndarray<nb::numpy, int32_t>, nb::ndarray<nb::numpy, float>> top_k(Floats logits, size_t k) {
    const float* x = logits.data();
    const size_t n = logits.shape(0);
    k = std::min(k, n);
    std::vector<int32_t> ids;
    const auto before = [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
    if (k) {
        ids.reserve(4 * k + 64);
        float floor = -INFINITY;
        for (size_t i = 0; i < n; i++) {
            if (x[i] < floor) continue;
            ids.push_back(int32_t(i));
            if (ids.size() >= 4 * k + 64) {
                std::nth_element(ids.begin(), ids.begin() + long(k) - 1, ids.end(), before);
                ids.resize(k);
                floor = x[ids[k - 1]];
            }
        }
        k = std::min(k, ids.size());
        std::partial_sort(ids.begin(), ids.begin() + long(k), ids.end(), before);
    }
    auto out_ids = array<int32_t>({k});
    auto values = array<float>({k});
    for (size_t i = 0; i < k; i++) {
        out_ids.data()[i] = ids[i];
        values.data()[i] = x[ids[i]];
    }
    return {out_ids, values};
}

// Read bandwidth of memory in GB/s: best of several passes over a buffer far larger than the caches.
double bandwidth(int n_threads, size_t megabytes) {
    nb::gil_scoped_release release;
    Arena arena;
    const size_t bytes = megabytes << 20;
    uint8_t* data = arena.allocate(bytes);
    std::memset(data, 0, bytes);
    Pool pool(n_threads);
    double best = 0;
    const int items = n_threads * 4;
    std::vector<float> sink(static_cast<size_t>(items));
    for (int pass = 0; pass < 8; pass++) {
        const auto start = std::chrono::steady_clock::now();
        pool.run(items, [&](int i, int) {
            sink[size_t(i)] = kernels().read(data + bytes / size_t(items) * size_t(i), bytes / size_t(items));
        });
        const std::chrono::duration<double> t = std::chrono::steady_clock::now() - start;
        best = std::max(best, double(bytes) / t.count() / 1e9);
    }
    return best;
}

nb::ndarray<nb::numpy, uint8_t> encode(Codes codes) {
    if (std::any_of(codes.data(), codes.data() + codes.size(), [](int16_t c) { return c == INT16_MIN; }))
        throw nb::value_error("codes must be above -32768");
    const auto bytes = encode_codes(codes.data(), codes.shape(0), codes.shape(1));
    auto out = array<uint8_t>({bytes.size()});
    std::copy(bytes.begin(), bytes.end(), out.data());
    return out;
}

nb::ndarray<nb::numpy, int16_t> decode(Bytes bytes, size_t rows, size_t cols) {
    // a byte holds fewer than 6,000 codes: more are not worth their memory
    if (rows && cols > (bytes.size() + 1) * 8192 / rows)
        throw nb::value_error("too few bytes for so many codes");
    auto out = array<int16_t>({rows, cols});
    bool good;
    {
        nb::gil_scoped_release release;
        good = decode_codes(bytes.data(), bytes.size(), rows, cols, out.data());
    }
    if (!good) throw nb::value_error("the bytes are not those of codes of this shape");
    return out;
}

}  // namespace

NB_MODULE(_core, m) {
    nb::class_<Cache>(m, "Cache")
        .def(
            "__init__", [](Cache* c, const Model& model, int n_ctx) { new (c) Cache(model.config, n_ctx); },
            "model"_a, "n_ctx"_a)
        .def_ro("n_ctx", &Cache::n_ctx)
        .def_ro("n_past", &Cache::n_past)
        .def_prop_ro("bytes", &Cache::bytes)
        .def(
            "truncate",
            [](Cache& c, int n) {
                if (n < 0 || n > c.n_past)
                    throw nb::value_error(("cannot truncate a cache of " + std::to_string(c.n_past) +
                                           " tokens to " + std::to_string(n))
                                              .c_str());
                c.n_past = n;
            },
            "n"_a);
    nb::class_<Model>(m, "Model")
        .def(
            "__init__",
            [](Model* self, const nb::dict& config, int n_threads, const std::string& mode) {
                using Mode = Model::Mode;
                const std::map<std::string, Mode> modes = {
                    {"exact", Mode::exact}, {"dense", Mode::dense}, {"predicted", Mode::predicted}};
                if (!modes.count(mode)) throw nb::value_error("mode must be 'exact', 'dense' or 'predicted'");
                Config c = config_of(config);
                if (mode != "dense" && !c.sparse())
                    throw nb::value_error(
                        (mode + " mode needs an activation with exact zeros (relu, fatrelu, shiftrelu)")
                            .c_str());
                new (self) Model(std::move(c), n_threads, modes.at(mode));
            },
            "config"_a, "n_threads"_a, "mode"_a)
        .def("set_tensor", &set_tensor, "name"_a, "type"_a, "shape"_a, "data"_a, "mapped"_a = false)
        .def("set_predictor", &Model::set_predictor, "kind"_a, "residual"_a, "thresholds"_a)
        .def("finish", &Model::finish)
        .def("forward", &forward, "cache"_a, "tokens"_a, "all_logits"_a = false)
        .def("stats",
             [](const Model& self) {
                 const Stats& s = self.stats;
                 const uint64_t per_token =
                     uint64_t(self.config.intermediate_size) * uint64_t(self.config.num_hidden_layers);
                 nb::dict d;
                 d["tokens"] = s.decode_tokens;
                 d["active"] = s.decode_active;
                 d["neurons"] = s.decode_tokens * per_token;
                 d["candidates"] = s.decode_candidates;
                 d["weight_bytes_read"] = s.decode_bytes;
                 d["prefill_tokens"] = s.prefill_tokens;
                 d["prefill_active"] = s.prefill_active;
                 d["prefill_neurons"] = s.prefill_tokens * per_token;
                 d["prefill_weight_bytes_read"] = s.prefill_bytes;
                 return d;
             })
        .def("reset_stats", [](Model& self) { self.stats = {}; })
        .def_prop_ro("mode",
                     [](const Model& self) {
                         return self.mode == Model::Mode::exact   ? "exact"
                                : self.mode == Model::Mode::dense ? "dense"
                                                                  : "predicted";
                     })
        .def_prop_rw(
            "predicting", [](const Model& self) { return self.predicting; },
            [](Model& self, bool on) {
                if (on && self.mode != Model::Mode::predicted)
                    throw nb::value_error("only predicted mode can predict");
                self.predicting = on;
            })
        .def_ro("skipping", &Model::skipping)
        .def_prop_ro("weight_bytes", &Model::weight_bytes)
        .def_prop_rw("n_threads", &Model::n_threads, &Model::set_threads);
    m.def("isa", [] { return kernels().isa; });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (auto* k : usable_kernels()) names.push_back(k->isa);
        return names;
    });
    m.def("top_k", &top_k, "logits"_a, "k"_a);
    m.def("encode_codes", &encode, "codes"_a);
    m.def("decode_codes", &decode, "data"_a, "rows"_a, "columns"_a);
    m.def("bandwidth", &bandwidth, "n_threads"_a, "megabytes"_a = 512);
}

}  // namespace prosparse
