"""ModelConfig <-> Hugging Face config.json, in the styles of transformers 4 and 5."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prosparse.model.activation import Activation
from prosparse.model.rope import RopeScaling

if TYPE_CHECKING:
    from prosparse.model.config import ModelConfig

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
}
_MODEL_TYPES = {name: name for name in _CLASSES} | {"sparsellama": "llama"}

# keys that change nothing about the function computed
_HARMLESS = {
    *("architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("initializer_range", "pad_token_id", "attention_dropout", "hidden_dropout", "pretraining_tp"),
    *("is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed"),
    *("output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate", "id2label"),
    *("label2id", "problem_type", "chunk_size_feed_forward", "torchscript", "bad_words_ids", "is_decoder"),
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "repetition_penalty", "mup_denominator"),
    *("keys_to_ignore_at_inference", "base_model_tp_plan", "base_model_pp_plan", "attn_implementation"),
    *("is_encoder_decoder", "num_labels"),
}
# keys of features that we do not compute, and the one value that means the feature is off
_MUST_BE = {
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
}
_ROPE_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"},
}


class _Keys:
    """A config being consumed: what is left at the end was not understood."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.left = {k: v for k, v in config.items() if k not in _HARMLESS and not k.startswith("_")}

    def pop(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value, or `default` when it is absent or null. ValueError when neither or of a wrong type."""
        value = self.left.pop(key, None)
        if value is None:
            if default is ...:
                raise ValueError(f"config.json: {key} is missing")
            return default
        if kind is float and _is_size(value):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and not _is_size(value)):
            raise ValueError(f"config.json: {key} must be of type {kind.__name__}, not {value!r:.80}")
        return value


def _is_size(value: object) -> bool:
    """Whether it is an integer of 64 bits: JSON's may be larger than any float."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = _architecture(config)
    keys = _Keys(config)
    for key, value in _MUST_BE.items():
        if (given := keys.left.pop(key, None)) is not None and given != value:
            raise ValueError(f"config.json: {key} = {given!r:.80} is not supported")
    heads, layers = keys.pop("num_attention_heads", int), keys.pop("num_hidden_layers", int)
    hidden = keys.pop("hidden_size", int)
    if min(heads, layers, hidden) < 1:
        raise ValueError(
            f"config.json: num_attention_heads {heads}, num_hidden_layers {layers} and hidden_size {hidden} "
            "must be positive"
        )
    # LLaMA's defaults are the plain ones; the classes of the other architectures have their own,
    # so there a missing key cannot be guessed
    plain = architecture in ("llama", "minicpm")
    context = keys.pop("max_position_embeddings", int)
    theta, scaling = _rope(keys, context)
    bias = keys.pop("attention_bias", bool, architecture == "qwen2")
    if bias != (architecture == "qwen2"):
        raise ValueError(f"config.json: attention_bias = {bias} is not supported for {architecture}")
    fields = {
        "architecture": architecture,
        "vocab_size": keys.pop("vocab_size", int),
        "hidden_size": hidden,
        "intermediate_size": keys.pop("intermediate_size", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.pop("num_key_value_heads", int, heads if plain else ...),
        "head_dim": keys.pop("head_dim", int, ... if architecture in ("qwen3", "gemma") else hidden // heads),
        "max_position_embeddings": context,
        "rms_norm_eps": keys.pop("rms_norm_eps", float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": _sliding_window(keys, architecture, layers),
        "tie_word_embeddings": keys.pop("tie_word_embeddings", bool, architecture in ("minicpm", "gemma")),
        "attention_bias": bias,
        "qk_norm": architecture == "qwen3",
        "activation": _activation(keys, architecture),
        "bos_token_id": keys.pop("bos_token_id", int, None),
        "eos_token_ids": _tokens(keys, "eos_token_id"),
    }
    if architecture == "minicpm":
        fields |= {
            "embedding_scale": keys.pop("scale_emb", float),
            "residual_scale": keys.pop("scale_depth", float) / math.sqrt(layers),
            "logit_scale": hidden / (keys.pop("dim_model_base", float) or math.nan),
        }
    if architecture == "gemma":
        fields["embedding_scale"] = math.sqrt(hidden)
    if unknown := sorted(k for k, v in keys.left.items() if v is not None):
        raise ValueError(
            f"config.json: {unknown[0]} = {keys.left[unknown[0]]!r:.80} is unknown for {architecture}, "
            "and ignoring it could give wrong results; remove the key if it does not matter"
        )
    return fields


def _architecture(config: Mapping[str, Any]) -> str:
    """From model_type or, as in MiniCPM-S whose file has none, from `architectures`."""
    kind, classes = config.get("model_type"), config.get("architectures")
    if kind is None and isinstance(classes, list) and len(classes) == 1:
        kind = next((name for name, cls in _CLASSES.items() if cls == classes[0]), classes[0])
    if isinstance(kind, str) and kind.lower().startswith("gemma") and kind != "gemma":
        raise ValueError(
            f"config.json: model_type {kind!r} is not supported, only the first gemma is: later ones have "
            "further norms, soft-capping or layers of two kinds"
        )
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise ValueError(f"config.json: model_type {kind!r} is not supported: {', '.join(_MODEL_TYPES)} are")
    return _MODEL_TYPES[kind]


def _activation(keys: _Keys, architecture: str) -> Activation:
    name = _gemma_activation(keys) if architecture == "gemma" else keys.pop("hidden_act", str, "silu")
    param = keys.pop("hidden_act_param", float, None)
    if name == "gelu":
        raise ValueError(
            "config.json: hidden_act 'gelu' is the erf form, which is not supported (gelu_pytorch_tanh is)"
        )
    return Activation.parse(name, param)


def _gemma_activation(keys: _Keys) -> str:
    """`hidden_activation`, where given, wins over `hidden_act`, whose "gelu" always meant the tanh form."""
    tanh = "gelu_pytorch_tanh"
    act = keys.pop("hidden_act", str, tanh)
    act = tanh if act == "gelu" else act
    name = keys.pop("hidden_activation", str, act)
    if act not in (tanh, name):
        raise ValueError(f"config.json: hidden_act {act!r} contradicts hidden_activation {name!r}")
    return name


def _tokens(keys: _Keys, key: str) -> tuple[int, ...]:
    value = keys.left.pop(key, None)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_size(v) for v in values):
        raise ValueError(f"config.json: {key} must be token ids, not {value!r:.80}")
    return tuple(dict.fromkeys(values))


def _sliding_window(keys: _Keys, architecture: str, layers: int) -> int | None:
    """None unless every layer slides; models that mix both kinds of layers are refused."""
    window = keys.pop("sliding_window", int, None)
    used = keys.pop("use_sliding_window", bool, architecture == "mistral") and window is not None
    first = keys.pop("max_window_layers", int, None)  # Qwen slides the layers from this one on
    kinds = keys.pop("layer_types", list, None)
    if kinds is not None:
        full = all(kind == "full_attention" for kind in kinds)
        sliding = all(kind == "sliding_attention" for kind in kinds)
    else:
        full = not used or (first is not None and first >= layers)
        sliding = used and (first == 0 or architecture == "mistral")
    if full:
        return None
    if not sliding or window is None:
        raise ValueError("config.json: sliding_window must hold for all layers or none (layer_types)")
    return window


def _rope(keys: _Keys, context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 writes both into `rope_parameters`, 4 only `rope_scaling`."""
    theta = keys.pop("rope_theta", float, 10000.0)
    rope = keys.pop("rope_scaling", dict, None)
    rope = dict(keys.pop("rope_parameters", dict, None) or rope or {})
    theta = _rope_number(rope, "rope_theta", theta)
    old_type = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_type)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: rope partial_rotary_factor is not supported")
    if not isinstance(kind, str):
        raise ValueError(f"config.json: rope scaling type must be a string, not {kind!r:.80}")
    if kind == "longrope":
        return theta, _equal_longrope(rope)
    if kind == "default":
        numbers: dict[str, Any] = {}
    elif kind in _ROPE_KEYS:
        numbers = {k: _rope_number(rope, k) for k in _ROPE_KEYS[kind] if rope.get(k) is not None}
        if "factor" not in numbers:
            raise ValueError(f"config.json: rope scaling {kind} needs a factor")
    else:
        raise ValueError(
            f"config.json: rope scaling type {kind!r} is not supported: default, {', '.join(_ROPE_KEYS)} are"
        )
    if unknown := sorted(str(k) for k, v in rope.items() if v is not None):
        raise ValueError(f"config.json: rope scaling {unknown[0]} is not supported for {kind}")
    if kind == "default":
        return theta, None
    if kind in ("llama3", "yarn"):
        original = numbers.get("original_max_position_embeddings", context)
        numbers["original_max_position_embeddings"] = int(original)
    return theta, RopeScaling(kind, **numbers)


def _rope_number(rope: dict[str, Any], key: str, default: float | None = None) -> float:
    value = rope.pop(key, default)
    if not (_is_size(value) or isinstance(value, float)) or not math.isfinite(value):
        raise ValueError(f"config.json: rope {key} must be a finite number, not {value!r:.80}")
    return float(value)


def _equal_longrope(rope: dict[str, Any]) -> RopeScaling:
    """longrope changes with the length of the text, unless both of its factor lists are the same."""
    short, long = rope.get("short_factor"), rope.get("long_factor")
    if not isinstance(short, list) or short != long or rope.get("attention_factor") != 1.0:
        raise ValueError(
            "config.json: rope scaling longrope is only supported with short_factor equal to long_factor "
            "and attention_factor 1.0"
        )
    if not all(_is_size(v) or isinstance(v, float) for v in short):
        raise ValueError("config.json: rope short_factor must be numbers")
    return RopeScaling("factors", factors=tuple(float(v) for v in short))


def fields_to_hf(config: "ModelConfig") -> dict[str, Any]:
    act = config.activation
    architecture = config.architecture
    if architecture == "llama" and config.sliding_window:
        architecture = "mistral"  # the same but for the window, which LLaMA configs cannot hold
    fields: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "gelu_pytorch_tanh" if act.name == "gelu" else act.name,
        "bos_token_id": config.bos_token_id,
    }
    if act.name in ("fatrelu", "shiftrelu"):
        fields["hidden_act_param"] = act.param
    if architecture == "gemma":
        fields["hidden_activation"] = fields["hidden_act"]  # transformers 4 reads this, 5 the other
    match config.eos_token_ids:
        case ():
            fields["eos_token_id"] = None
        case (one,):
            fields["eos_token_id"] = one
        case many:
            fields["eos_token_id"] = list(many)
    if architecture == "mistral":
        fields["sliding_window"] = config.sliding_window
    elif architecture in ("qwen2", "qwen3"):
        sliding = config.sliding_window is not None
        fields |= {"use_sliding_window": sliding, "sliding_window": config.sliding_window}
        fields["max_window_layers"] = 0 if sliding else config.num_hidden_layers
    elif config.sliding_window is not None:
        raise ValueError(f"an HF {architecture} config cannot hold sliding_window = {config.sliding_window}")
    if architecture == "minicpm":
        fields |= {
            "scale_emb": config.embedding_scale,
            "scale_depth": _tidy(config.residual_scale * math.sqrt(config.num_hidden_layers)),
            "dim_model_base": _tidy(config.hidden_size / config.logit_scale),
        }
    return fields


def _tidy(value: float) -> float | int:
    """Rounded to float32's seven digits, so that 1.4 / sqrt(52) comes back as 1.4."""
    value = float(f"{value:.7g}")
    return int(value) if value.is_integer() else value


def _rope_to_hf(config: "ModelConfig") -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.type == "factors":
        factors = list(scaling.factors)
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
        }
    fields: dict[str, Any] = {"rope_type": scaling.type}
    for key in sorted(_ROPE_KEYS[scaling.type]):
        if (value := getattr(scaling, key)) is not None:
            fields[key] = value
    return fields
