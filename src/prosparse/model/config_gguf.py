"""ModelConfig <-> GGUF metadata keys."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from prosparse.model.activation import Activation
from prosparse.model.rope import RopeScaling

if TYPE_CHECKING:
    from prosparse.model.config import ModelConfig

# `mistral` is written as `llama`, as llama.cpp does: the two differ in nothing but sliding_window
_ARCHITECTURES = ("llama", "minicpm", "qwen2", "qwen3", "gemma")
_INTEGERS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_SCALES = {"embedding_scale": 12.0, "residual_scale": 1.4, "logit_scale": 256.0}  # MiniCPM-1B and 2B
_ROPE_SCALING = ("type", "factor", "original_context_length", "attn_factor", "finetuned")
_UNUSED = {"tensor_data_layout"}


def fields_from_gguf(
    metadata: Mapping[str, Any], tied: bool, rope_factors: tuple[float, ...]
) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if isinstance(architecture, str) and architecture.startswith("gemma") and architecture != "gemma":
        raise ValueError(
            f"general.architecture {architecture!r} is not supported, only the first gemma is: "
            "later ones have further norms, soft-capping or layers of two kinds"
        )
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"general.architecture {architecture!r} is not supported: {', '.join(_ARCHITECTURES)} are"
        )
    prefix = f"{architecture}."
    keys = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    if not keys.pop("attention.causal", True):
        raise ValueError(f"{prefix}attention.causal must be true: only causal models are supported")
    for name in ("expert_count", "expert_used_count"):
        if keys.pop(name, 0):
            raise ValueError(f"{prefix}{name}: mixtures of experts are not supported")

    def integer(name: str, default: int | None = None) -> int:
        value = keys.pop(name, default)
        if value is None:
            raise ValueError(f"{prefix}{name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**64:
            raise ValueError(f"{prefix}{name} must be one integer, not {value!r:.80}")
        return value

    def number(name: str, default: float | None = None) -> float:
        value = keys.pop(name, default)
        if value is None:
            raise ValueError(f"{prefix}{name} is missing")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{prefix}{name} must be a number, not {value!r:.80}")
        return _decimal(value)

    fields: dict[str, Any] = {field: integer(key) for key, field in _INTEGERS.items()}
    heads, layers, hidden = (fields[n] for n in ("num_attention_heads", "num_hidden_layers", "hidden_size"))
    if min(heads, layers, hidden) < 1:
        raise ValueError(
            f"{prefix}attention.head_count {heads}, block_count {layers} and embedding_length {hidden} "
            "must be positive"
        )
    head_dim = integer("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (value := integer(name, head_dim)) != head_dim:
            raise ValueError(f"{prefix}{name} {value} differs from the head size {head_dim}: not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else None
    scales = _scales(keys, prefix, architecture, layers, hidden)
    fields |= {
        "architecture": architecture,
        "vocab_size": integer("vocab_size", n_tokens),
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "sliding_window": integer("attention.sliding_window", 0) or None,
        "tie_word_embeddings": tied,
        "attention_bias": architecture == "qwen2",
        "qk_norm": architecture == "qwen3",
        "activation": _activation(metadata, keys.pop("hidden_activation", None), prefix),
        **scales,
        "rope_scaling": _rope_scaling(keys, prefix, rope_factors),
        "bos_token_id": _token(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_token_ids": _eos_tokens(metadata),
    }
    if unknown := sorted(keys.keys() - _UNUSED):
        raise ValueError(f"{prefix}{unknown[0]} = {keys[unknown[0]]!r:.80} is not supported")
    return fields


def _decimal(value: float) -> float:
    """The shortest decimal with the same float32: GGUF's 9.99999974e-06 is the 1e-05 that HF writes."""
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError(f"{value!r:.80} is no number that a GGUF file can hold")
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _activation(metadata: Mapping[str, Any], other: Any, prefix: str) -> Activation:
    """From `prosparse.hidden_act` or, for files of other programs, `<arch>.hidden_activation`."""
    own = metadata.get("prosparse.hidden_act")
    param = metadata.get("prosparse.hidden_act_param")
    if isinstance(param, int | float) and not isinstance(param, bool):
        param = _decimal(param)
    if own is None and other is None:
        if param is not None:
            raise ValueError("prosparse.hidden_act_param is there, but prosparse.hidden_act is missing")
        return Activation("gelu" if prefix == "gemma." else "silu")  # what llama.cpp runs such a file with
    activation = Activation.parse(own if own is not None else other, param)
    if own is not None and other is not None:
        base = other.partition("_")[0] if isinstance(other, str) else other
        same = base == activation.name if activation.sparse else Activation.parse(other) == activation
        if not same:
            raise ValueError(f"prosparse.hidden_act {own!r} contradicts {prefix}hidden_activation {other!r}")
    return activation


def _scales(
    keys: dict[str, Any], prefix: str, architecture: str, layers: int, hidden: int
) -> dict[str, float]:
    """MiniCPM's three factors, and Gemma's of the embeddings, which no file names.

    The oldest MiniCPM files lack them: those models all had the same.
    """
    found = {name: keys.pop(name) for name in _SCALES if name in keys}
    for name, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{prefix}{name} must be a number, not {value!r:.80}")
    if architecture != "minicpm":
        if any(value not in (0, 1) for value in found.values()):
            raise ValueError(f"{prefix}{next(iter(found))} is only supported for minicpm")
        return {"embedding_scale": math.sqrt(hidden)} if architecture == "gemma" else {}
    if not found:
        return {
            "embedding_scale": _SCALES["embedding_scale"],
            "residual_scale": _SCALES["residual_scale"] / math.sqrt(layers),
            "logit_scale": hidden / _SCALES["logit_scale"],
        }
    if missing := [name for name in _SCALES if name not in found]:
        raise ValueError(f"{prefix}{missing[0]} is missing, though {', '.join(found)} is given")
    return {name: _decimal(value) for name, value in found.items()}


def _rope_scaling(keys: dict[str, Any], prefix: str, rope_factors: tuple[float, ...]) -> RopeScaling | None:
    given = {
        name: keys.pop(f"rope.scaling.{name}") for name in _ROPE_SCALING if f"rope.scaling.{name}" in keys
    }
    kind = given.get("type", "none")
    if "rope.scale_linear" in keys:  # the key that `rope.scaling.factor` replaced
        given["factor"], kind = keys.pop("rope.scale_linear"), "linear"
    factor, attention = given.get("factor", 1.0), given.get("attn_factor", 1.0)
    context = given.get("original_context_length", 0)
    for name, value in (("factor", factor), ("attn_factor", attention), ("original_context_length", context)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{prefix}rope.scaling.{name} must be a number, not {value!r:.80}")
    if not isinstance(context, int):
        raise ValueError(f"{prefix}rope.scaling.original_context_length must be an integer, not {context}")
    if kind == "yarn" and attention != 1:
        raise ValueError(f"{prefix}rope.scaling.attn_factor {attention} is not supported")
    if rope_factors:
        if kind not in ("none", "linear") or factor not in (0, 1):
            raise ValueError(
                f"rope_freqs.weight together with {prefix}rope.scaling.type {kind!r}: not supported"
            )
        return RopeScaling("factors", factors=rope_factors)
    match kind:
        case "none":
            return None
        case "linear":
            return None if factor in (0, 1) else RopeScaling("linear", factor=_decimal(factor))
        case "yarn":
            return RopeScaling("yarn", factor=_decimal(factor), original_max_position_embeddings=context)
    raise ValueError(f"{prefix}rope.scaling.type {kind!r} is not supported: none, linear and yarn are")


def _token(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{key} must be an integer, not {value!r:.80}")
    return value


def _eos_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, of turn and of message: each ends an answer."""
    found = (_token(metadata, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in found if token is not None))


def fields_to_gguf(config: "ModelConfig") -> dict[str, Any]:
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    keys: dict[str, Any] = {key: getattr(config, field) for key, field in _INTEGERS.items()}
    keys |= {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
        "hidden_activation": config.activation.name,
    }
    if config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    if architecture == "minicpm":
        keys |= {name: float(getattr(config, name)) for name in _SCALES}
    scaling = config.rope_scaling
    if scaling and scaling.type == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    elif scaling and scaling.type == "yarn":
        if (scaling.attention_factor, scaling.beta_fast, scaling.beta_slow) != (None, 32, 1):
            raise ValueError("yarn with its own attention_factor, beta_fast or beta_slow has no GGUF form")
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        }
    tokens = {"bos": config.bos_token_id, "eos": config.eos_token_ids[0] if config.eos_token_ids else None}
    if len(config.eos_token_ids) > 1:
        tokens["eot"] = config.eos_token_ids[1]
    if len(config.eos_token_ids) > 2:
        tokens["eom"] = config.eos_token_ids[2]
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in keys.items()},
        "prosparse.hidden_act": config.activation.name,
        "prosparse.hidden_act_param": float(config.activation.param),
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in tokens.items() if token is not None},
    }
