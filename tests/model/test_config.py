"""ModelConfig: published configs, round trips through both formats, and loud refusals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse.model.activation import Activation
from prosparse.model.config import ARCHITECTURES, ModelConfig
from prosparse.model.rope import RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "rope_scaling": None,
    "rope_interleaved": False,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {}},
}
MINICPM_S = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.03,
    "hidden_size": 1536,
    "intermediate_size": 3840,
    "num_hidden_layers": 52,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 73440,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "initializer_range": 0.1,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "transformers_version": "4.36.0",
}

GEMMA = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 24576,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}


def qwen(kind, **more):
    sizes = {k: v for k, v in LLAMA.items() if k not in ("rope_interleaved", "mlp_bias", "attention_bias")}
    return (
        sizes | {"architectures": [], "model_type": kind, "head_dim": 64, "use_sliding_window": False} | more
    )


def test_llama():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.architecture, config.head_dim, config.rope_theta) == ("llama", 64, 1e5)
    assert config.tie_word_embeddings and config.eos_token_ids == (2,)
    assert config.activation == Activation("silu")


def test_minicpm_has_its_scales_and_default_tie():
    config = ModelConfig.from_hf(MINICPM_S)
    assert config.architecture == "minicpm" and config.tie_word_embeddings
    assert config.embedding_scale == 12
    assert config.residual_scale == pytest.approx(0.194145, abs=1e-6)
    assert config.logit_scale == 6
    assert config.activation == Activation("fatrelu", 0.03)
    assert config.to_hf()["scale_depth"] == 1.4 and config.to_hf()["dim_model_base"] == 256


def test_sparsellama_is_llama():
    prosparse = LLAMA | {"architectures": ["SparseLlamaForCausalLM"], "model_type": "sparsellama"}
    config = ModelConfig.from_hf(prosparse | {"hidden_act": "fatrelu", "hidden_act_param": 0.01})
    assert (config.architecture, config.activation) == ("llama", Activation("fatrelu", 0.01))


def test_qwen():
    two, three = ModelConfig.from_hf(qwen("qwen2")), ModelConfig.from_hf(qwen("qwen3", attention_bias=False))
    assert (two.attention_bias, two.qk_norm) == (True, False)
    assert (three.attention_bias, three.qk_norm) == (False, True)


def test_gemma():
    config = ModelConfig.from_hf(GEMMA)
    assert (config.architecture, config.head_dim, config.tie_word_embeddings) == ("gemma", 256, True)
    assert config.embedding_scale == math.sqrt(3072)
    metadata = config.to_gguf()
    assert metadata["gemma.attention.key_length"] == metadata["gemma.attention.value_length"] == 256
    assert "gemma.embedding_scale" not in metadata  # llama.cpp knows it by the architecture


@pytest.mark.parametrize(
    ("act", "activation", "expected"),
    [
        ("gelu", None, "gelu"),
        (None, None, "gelu"),
        (None, "gelu_pytorch_tanh", "gelu"),
        ("gelu", "gelu_pytorch_tanh", "gelu"),
        ("gelu_pytorch_tanh", None, "gelu"),
        ("gelu_pytorch_tanh", "relu", "relu"),
        ("relu", None, "relu"),
        ("relu", "relu", "relu"),
        ("silu", None, "silu"),
    ],
)
def test_activation_of_gemma(act, activation, expected):
    config = ModelConfig.from_hf(GEMMA | {"hidden_act": act, "hidden_activation": activation})
    assert config.activation == Activation(expected)
    assert ModelConfig.from_hf(config.to_hf()) == ModelConfig.from_gguf(config.to_gguf()) == config


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gemma3_text", "gemma3n"])
def test_later_gemmas_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind}.*soft-capping"):
        ModelConfig.from_hf(GEMMA | {"model_type": kind})
    with pytest.raises(ValueError, match=f"{kind}.*soft-capping"):
        ModelConfig.from_gguf({"general.architecture": kind})


def test_gemma_of_other_programs_is_gelu():
    metadata = ModelConfig.from_hf(GEMMA).to_gguf()
    for name in ("prosparse.hidden_act", "prosparse.hidden_act_param", "gemma.hidden_activation"):
        del metadata[name]
    assert ModelConfig.from_gguf(metadata) == ModelConfig.from_hf(GEMMA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu", "hidden_activation": "gelu_pytorch_tanh"}, "contradicts"),
        ({"hidden_activation": "gelu"}, "erf"),
        ({"hidden_act": "fatrelu"}, "needs hidden_act_param"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_gemma_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(GEMMA | change)


@pytest.mark.parametrize(
    "class_name", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config", "GemmaConfig"]
)
@pytest.mark.parametrize("use_diff", [True, False])
def test_what_transformers_writes_is_read(class_name, use_diff):
    transformers = pytest.importorskip("transformers")
    written = getattr(transformers, class_name)(num_hidden_layers=4, max_position_embeddings=2048)
    config = ModelConfig.from_hf(json.loads(written.to_json_string(use_diff=use_diff)))
    assert config.num_hidden_layers == 4
    assert config.sliding_window == getattr(written, "sliding_window", None)
    again = getattr(transformers, class_name)(**config.to_hf())
    assert ModelConfig.from_hf(json.loads(again.to_json_string())) == config


def test_mixed_layer_types_are_refused():
    mixed = qwen("qwen3", sliding_window=64, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="layer_types"):
        ModelConfig.from_hf(mixed)
    config = ModelConfig.from_hf(mixed | {"layer_types": ["sliding_attention"] * 30})
    assert config.sliding_window == 64


def test_qwen_slides_from_a_layer_on():
    sliding = qwen("qwen2", use_sliding_window=True, sliding_window=64)
    assert ModelConfig.from_hf(sliding | {"max_window_layers": 0}).sliding_window == 64
    assert ModelConfig.from_hf(sliding | {"max_window_layers": 30}).sliding_window is None
    with pytest.raises(ValueError, match="sliding_window must hold for all layers or none"):
        ModelConfig.from_hf(sliding | {"max_window_layers": 28})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 8}, "num_experts"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"something_new": 1}, "something_new"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "erf"),
        ({"hidden_act": "relu2"}, "unknown activation 'relu2'"),
        ({"hidden_act": "fatrelu"}, "hidden_act_param"),
        ({"model_type": "phi"}, "model_type 'phi'"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": "576"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"bos_token_id": 49152}, "bos_token_id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "mscale"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}, "longrope"),
        ({"rope_scaling": 3}, "rope_scaling"),
    ],
)
def test_from_hf_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | change)


def test_a_null_key_is_an_absent_one():
    assert ModelConfig.from_hf(LLAMA | {"something_new": None}) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize("missing", ["scale_emb", "scale_depth", "dim_model_base"])
def test_minicpm_without_a_scale_is_refused(missing):
    with pytest.raises(ValueError, match=missing):
        ModelConfig.from_hf({k: v for k, v in MINICPM_S.items() if k != missing})


@st.composite
def configs(draw):
    architecture = draw(st.sampled_from(ARCHITECTURES))
    act = draw(st.sampled_from(["silu", "relu", "gelu", "fatrelu", "shiftrelu"]))
    kv, group, half = (draw(st.integers(1, 4)) for _ in range(3))
    scale = st.integers(1, 1000).map(lambda n: n / 64) if architecture == "minicpm" else st.just(1.0)
    hidden = draw(st.integers(1, 10**5))
    context = draw(st.integers(1, 1 << 20))
    scaling = st.sampled_from(
        [
            None,
            RopeScaling("linear", factor=4.0),
            RopeScaling("yarn", factor=4.0, original_max_position_embeddings=4096),
            RopeScaling("factors", factors=(1.5,) * half),
        ]
    )
    return ModelConfig(
        architecture=architecture,
        vocab_size=draw(st.integers(10, 10**6)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 10**5)),
        num_hidden_layers=draw(st.integers(1, 200)),
        num_attention_heads=kv * group,
        num_key_value_heads=kv,
        head_dim=2 * half,
        max_position_embeddings=context,
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_theta=draw(st.sampled_from([1e4, 5e5, 1e6])),
        rope_scaling=draw(scaling),
        sliding_window=draw(st.none() | st.integers(1, 1 << 20))
        if architecture not in ("minicpm", "gemma")
        else None,
        tie_word_embeddings=architecture == "gemma" or draw(st.booleans()),
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        activation=Activation(act, draw(st.sampled_from([0.01, 0.03, -2.5])) if "tr" in act else 0.0),
        embedding_scale=math.sqrt(hidden) if architecture == "gemma" else draw(scale),
        residual_scale=draw(scale),
        logit_scale=draw(scale),
        bos_token_id=draw(st.none() | st.integers(0, 9)),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 9), unique=True, max_size=3))),
    )


def approximately(config):
    """Without what the formats may rename or round."""
    scales = {name: 1.0 for name in ("embedding_scale", "residual_scale", "logit_scale")}
    return replace(config, architecture="llama", **scales)


@given(configs())
def test_hf_round_trip(config):
    again = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert approximately(again) == approximately(config)
    if not (config.architecture == "llama" and config.sliding_window):
        assert again.architecture == config.architecture
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        assert getattr(again, name) == pytest.approx(getattr(config, name), rel=1e-6)


@given(configs())
def test_gguf_round_trip(config):
    factors = config.rope_scaling.factors if config.rope_scaling else ()
    metadata = config.to_gguf()
    again = ModelConfig.from_gguf(metadata, tied=config.tie_word_embeddings, rope_factors=factors)
    assert approximately(again) == approximately(config)
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        assert getattr(again, name) == pytest.approx(getattr(config, name), rel=1e-6)


def gguf_metadata(**changes):
    metadata = ModelConfig.from_hf(LLAMA).to_gguf()
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def test_gguf_without_activation_keys_is_silu():
    metadata = gguf_metadata(
        prosparse__hidden_act=None, prosparse__hidden_act_param=None, llama__hidden_activation=None
    )
    assert ModelConfig.from_gguf(metadata).activation == Activation("silu")


@pytest.mark.parametrize(("name", "expected"), [("relu", "relu"), ("gelu", "gelu"), ("swish", "silu")])
def test_activation_key_of_other_programs(name, expected):
    metadata = gguf_metadata(
        prosparse__hidden_act=None, prosparse__hidden_act_param=None, llama__hidden_activation=name
    )
    assert ModelConfig.from_gguf(metadata).activation.name == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "phi2"}, "general.architecture 'phi2'"),
        ({"general__architecture": None}, "general.architecture None"),
        ({"prosparse__hidden_act": "fatrelu"}, "fatrelu"),
        ({"prosparse__hidden_act": "relu6"}, "unknown activation 'relu6'"),
        ({"prosparse__hidden_act": "relu"}, "contradicts"),
        (
            {"prosparse__hidden_act": None, "llama__hidden_activation": None},
            "prosparse.hidden_act is missing",
        ),
        ({"llama__embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama__block_count": 0}, "block_count 0"),
        ({"llama__block_count": 2**31}, "num_hidden_layers"),
        ({"llama__attention__head_count": [9] * 30}, "attention.head_count"),
        ({"llama__rope__dimension_count": 32}, "rope.dimension_count 32"),
        ({"llama__attention__value_length": 32}, "attention.value_length 32"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__attention__causal": False}, "attention.causal"),
        ({"llama__attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"llama__embedding_scale": 12.0}, "embedding_scale"),
        ({"llama__rope__scaling__type": "longrope"}, "longrope"),
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__attn_factor": 2.0}, "attn_factor"),
        ({"llama__rope__freq_base": "10000"}, "rope.freq_base"),
        ({"llama__attention__layer_norm_rms_epsilon": math.nan}, "rms_norm_eps"),
        ({"llama__vocab_size": None}, "vocab_size"),
        ({"tokenizer__ggml__eos_token_id": 49152}, "eos_token_id"),
        ({"tokenizer__ggml__bos_token_id": "<s>"}, "bos_token_id"),
    ],
)
def test_from_gguf_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_gguf(gguf_metadata(**changes))


NUMBERS = (0, 1, -1, True, 10**400, 2**63, 1e308, 1e-308, math.nan, math.inf, -math.inf)
ROPE_DICTS = (
    {"type": [1]},
    {"type": "yarn", "factor": 4.0},
    {"type": "linear", "factor": 10**400},
    {"rope_type": "yarn", "factor": 1e-300, "beta_fast": 1e300},
)
OTHERS = (None, "", "x", "yarn", "linear", "fatrelu_1", [], [1], [[1]], {}, ["sliding_attention"])
ODD = st.sampled_from([*NUMBERS, *ROPE_DICTS, *OTHERS])
MORE_HF = ["rope_parameters", "layer_types", "sliding_window", "use_sliding_window", "hidden_act_param"]
MORE_GGUF = [f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "attn_factor")]


@given(st.data())
def test_odd_values_never_crash(data):
    base = data.draw(
        st.sampled_from([LLAMA, MINICPM_S, GEMMA, qwen("qwen2"), LLAMA | {"model_type": "mistral"}])
    )
    change = data.draw(st.dictionaries(st.sampled_from([*base, *MORE_HF]), ODD, max_size=3))
    try:
        config = ModelConfig.from_hf(base | change)
    except ValueError:
        return
    assert np.isfinite(config.inv_freq()).all()
    assert ModelConfig.from_hf(config.to_hf()).inv_freq().shape == config.inv_freq().shape


@given(st.data())
def test_odd_gguf_values_never_crash(data):
    base = ModelConfig.from_hf(data.draw(st.sampled_from([LLAMA, MINICPM_S, GEMMA]))).to_gguf()
    more = [f"{base['general.architecture']}.{key}" for key in MORE_GGUF]
    change = data.draw(
        st.dictionaries(st.sampled_from([*base, *more, "tokenizer.ggml.tokens"]), ODD, max_size=3)
    )
    try:
        config = ModelConfig.from_gguf(base | change)
    except ValueError:
        return
    assert np.isfinite(config.inv_freq()).all()


def test_oldest_minicpm_files_have_the_scales_of_their_time():
    config = ModelConfig.from_hf(MINICPM_S)
    metadata = config.to_gguf()
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        del metadata[f"minicpm.{name}"]
    old = ModelConfig.from_gguf(metadata)
    assert (old.embedding_scale, old.logit_scale) == (12, 6)
    assert old.residual_scale == pytest.approx(1.4 / math.sqrt(52))
    with pytest.raises(ValueError, match="residual_scale is missing"):
        ModelConfig.from_gguf(metadata | {"minicpm.embedding_scale": 12.0, "minicpm.logit_scale": 6.0})


def test_what_no_file_can_hold_is_not_written():
    config = ModelConfig.from_hf(LLAMA)
    for change in ({"qk_norm": True}, {"attention_bias": True}, {"embedding_scale": 2.0}):
        for write in (replace(config, **change).to_hf, replace(config, **change).to_gguf):
            with pytest.raises(ValueError, match=next(iter(change))):
                write()


ROPES = {
    "linear": {"factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 1000000.0},
    "longrope": {
        "short_factor": [1 + i / 8 for i in range(32)],
        "long_factor": [1 + i / 8 for i in range(32)],
        "attention_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_equal_transformers(kind):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"rope_type": kind} | ROPES[kind]
    theirs = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=32768, rope_parameters=settings
    )
    config = ModelConfig.from_hf(json.loads(theirs.to_json_string()))
    expected, attention_factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    assert np.allclose(config.inv_freq(), expected.numpy(), rtol=1e-6, atol=0)
    assert config.rope_attention_factor() == pytest.approx(attention_factor)
    assert config.inv_freq().dtype == np.float32


def test_transformers_4_and_5_write_the_same_rope():
    old = LLAMA | {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    new |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
