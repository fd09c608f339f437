"""The numpy engine against transformers on the same random weights, and MiniCPM against its formula."""

import math

import numpy as np
import pytest

from prosparse.engine.backend import core_config
from prosparse.engine.naive import NaiveCache, NaiveModel
from prosparse.model.model import Model
from prosparse.model.names import less_one_in_hf
from prosparse.model.rope import RopeScaling

TOKENS = np.random.default_rng(1).integers(0, 256, 33).astype(np.int32)


def load(model: Model, mode: str = "dense") -> NaiveModel:
    naive = NaiveModel(core_config(model.config), 1, mode)
    for name, tensor in model.tensors.items():
        naive.set_tensor(name, tensor.type, tensor.shape, tensor.data)
    naive.finish()
    return naive


def logits(model: Model, mode: str = "dense", tokens: np.ndarray = TOKENS) -> np.ndarray:
    naive = load(model, mode)
    return naive.forward(NaiveCache(naive, 64), tokens, all_logits=True)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def transformers_logits(model: Model, **changes: object) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = model.config
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma": "Gemma"}[
        c.architecture
    ]
    values = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tie_word_embeddings,
        "hidden_act": {"gelu": "gelu_pytorch_tanh"}.get(c.activation.name, c.activation.name),
        "attn_implementation": "eager",
    } | changes
    config = getattr(transformers, f"{kind}Config")(**values)
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    weights = {
        name: torch.from_numpy(t.dequantize() - less_one_in_hf(c, name)) for name, t in model.tensors.items()
    }
    if c.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    reference.load_state_dict(weights)
    with torch.no_grad():
        return reference(torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "llama"},
        {"architecture": "llama", "tied": True, "kv": 1, "act": "relu", "rope_theta": 100000.0},
        {"architecture": "llama", "head_dim": 10, "hidden": 52, "intermediate": 77, "act": "gelu"},
        {"architecture": "mistral", "kv": 4},
        {"architecture": "qwen2", "bias": True},
        {"architecture": "qwen3", "qk_norm": True, "head_dim": 32},
        {"architecture": "gemma", "act": "gelu", "head_dim": 32, "kv": 1},
        {"architecture": "gemma", "act": "relu", "head_dim": 16, "kv": 4, "hidden": 52},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_equals_transformers(tiny_model, options):
    model = tiny_model(**options)
    close(logits(model), transformers_logits(model))


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", factor=2.0),
        RopeScaling("llama3", factor=8.0, original_max_position_embeddings=16),
        RopeScaling("yarn", factor=4.0, original_max_position_embeddings=128),
    ],
    ids=lambda scaling: scaling.type,
)
def test_rope_scaling_equals_transformers(tiny_model, scaling):
    model = tiny_model(rope_scaling=scaling)
    rope = {"rope_type": scaling.type, "rope_theta": 10000.0, "factor": scaling.factor}
    if scaling.type != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    close(logits(model), transformers_logits(model, rope_parameters=rope))


def test_minicpm_scales(tiny_model):
    """scale_emb on embeddings, scale_depth/sqrt(layers) on both branches, hidden divided before the head."""
    scales = {"embedding_scale": 12.0, "residual_scale": 1.4 / math.sqrt(2), "logit_scale": 6.0}
    model = tiny_model("minicpm", act="fatrelu", act_param=0.03, tied=True, layers=1, **scales)
    w = {name: tensor.dequantize() for name, tensor in model.tensors.items()}
    layer = "model.layers.0."

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + 1e-5) * w[name]

    # one token at position 0: no rotation, and attention returns its own value
    h = w["model.embed_tokens.weight"][7] * 12
    v = w[layer + "self_attn.v_proj.weight"] @ norm(h, layer + "input_layernorm.weight")
    v = np.repeat(v.reshape(2, 24), 2, axis=0).ravel()
    h = h + w[layer + "self_attn.o_proj.weight"] @ v * scales["residual_scale"]
    x = norm(h, layer + "post_attention_layernorm.weight")
    gate = w[layer + "mlp.gate_proj.weight"] @ x
    gate[gate < 0.03] = 0
    y = w[layer + "mlp.down_proj.weight"] @ (gate * (w[layer + "mlp.up_proj.weight"] @ x))
    h = norm(h + y * scales["residual_scale"], "model.norm.weight") / 6
    close(logits(model, tokens=np.array([7], np.int32)), w["model.embed_tokens.weight"] @ h)


@pytest.mark.parametrize("act", ["relu", "fatrelu_0.2", "shiftrelu_0.1"])
def test_exact_equals_dense_and_skips(tiny_model, act):
    model = tiny_model(act=act)
    close(logits(model, "exact"), logits(model, "dense"), 1e-5)
    naive = load(model, "exact")
    naive.forward(NaiveCache(naive, 64), TOKENS[:1])
    stats = naive.stats()
    assert stats["tokens"] == 1 and stats["prefill_tokens"] == 0
    assert stats["neurons"] == 2 * 160
    assert 0 < stats["active"] < 0.7 * stats["neurons"]
    dense = load(model, "dense")
    dense.forward(NaiveCache(dense, 64), TOKENS[:1])
    skipped = 2 * (stats["neurons"] - stats["active"]) * 96 * 4  # up row and down column, float32
    assert dense.stats()["weight_bytes_read"] - stats["weight_bytes_read"] == skipped


def test_exact_mode_needs_a_sparse_activation(tiny_model):
    with pytest.raises(ValueError, match="silu"):
        load(tiny_model(), "exact")


def test_decode_equals_prefill_and_truncate_forgets(tiny_model):
    naive = load(tiny_model())
    whole = naive.forward(NaiveCache(naive, 64), TOKENS, all_logits=True)
    cache = NaiveCache(naive, 64)
    naive.forward(cache, TOKENS[::-1])
    cache.truncate(0)
    naive.forward(cache, TOKENS[:20])
    steps = [naive.forward(cache, TOKENS[i : i + 1])[0] for i in range(20, len(TOKENS))]
    close(np.array(steps), whole[20:], 1e-5)


def test_bad_input_is_refused(tiny_model):
    naive = load(tiny_model())
    cache = NaiveCache(naive, 4)
    for tokens in ([], [288], [-1], [[1]]):
        with pytest.raises(ValueError, match="token"):
            naive.forward(cache, tokens)
    with pytest.raises(ValueError, match="5 tokens after 0 do not fit a context of 4"):
        naive.forward(cache, [1] * 5)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(1)
