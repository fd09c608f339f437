"""ModelConfig: all about a model but its weights, read strictly so that nothing runs fluently wrong."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from prosparse.model.activation import Activation
from prosparse.model.rope import RopeScaling

ARCHITECTURES = ("llama", "minicpm", "mistral", "qwen2", "qwen3", "gemma")

# greatest believable sizes: what a damaged file asks for must not be allocated
_SIZES = {
    "vocab_size": 2**31 - 1,
    "hidden_size": 2**31 - 1,
    "intermediate_size": 2**31 - 1,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31 - 1,
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A LLaMA-family decoder; fields have their Hugging Face names where HF has one."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens each position sees, itself included; None = all
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v only, as in Qwen2
    qk_norm: bool = False  # RMS norm of each q and k head, as in Qwen3
    activation: Activation = field(default_factory=Activation)
    embedding_scale: float = 1.0  # embeddings are multiplied by it (MiniCPM scale_emb, Gemma sqrt(hidden))
    residual_scale: float = 1.0  # attention and FFN outputs are multiplied by it (scale_depth / sqrt(layers))
    logit_scale: float = 1.0  # logits are divided by it (hidden_size / dim_model_base)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"unknown architecture {self.architecture!r}: {', '.join(ARCHITECTURES)} are known"
            )
        for name, most in _SIZES.items():
            _check_int(name, getattr(self, name), 1, most)
        if self.sliding_window is not None:
            _check_int("sliding_window", self.sliding_window, 1, 2**31 - 1)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta", "embedding_scale", "residual_scale", "logit_scale"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number, not {value!r}")
        if self.architecture == "gemma" and not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be true for gemma: llama.cpp knows no other")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be greater than 1, not {self.rope_theta}")
        for token in (self.bos_token_id, *self.eos_token_ids):
            if token is not None:
                _check_int("bos_token_id or eos_token_id", token, 0, self.vocab_size - 1)
        if self.rope_scaling:
            self.rope_scaling.frequency_divisors(self.head_dim, self.rope_theta)  # checks the factor count

    def inv_freq(self) -> np.ndarray:
        """float32 [head_dim/2]: rotation per position of each pair of dimensions, scaling included."""
        frequencies = self.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.rope_scaling:
            frequencies = frequencies / self.rope_scaling.frequency_divisors(self.head_dim, self.rope_theta)
        return frequencies.astype(np.float32)

    def rope_attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return self.rope_scaling.cos_sin_scale() if self.rope_scaling else 1.0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the contents of a config.json. ValueError names any key that is missing, bad or unknown."""
        from prosparse.model.config_hf import fields_from_hf

        return cls(**fields_from_hf(config))

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json, without `torch_dtype`."""
        from prosparse.model.config_hf import fields_to_hf

        self._check_writable()
        return fields_to_hf(self)

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, tied: bool = True, rope_factors: tuple[float, ...] = ()
    ) -> Self:
        """From GGUF metadata, and the two facts that GGUF keeps in tensors instead:
        whether `output.weight` is absent, and the numbers of `rope_freqs.weight`."""
        from prosparse.model.config_gguf import fields_from_gguf

        return cls(**fields_from_gguf(metadata, tied, rope_factors))

    def to_gguf(self) -> dict[str, Any]:
        """The architecture and activation keys of a GGUF file (see `from_gguf` for what they leave out)."""
        from prosparse.model.config_gguf import fields_to_gguf

        self._check_writable()
        return fields_to_gguf(self)

    def _check_writable(self) -> None:
        """File formats derive these fields from the architecture alone."""
        implied: dict[str, float] = {
            "attention_bias": self.architecture == "qwen2",
            "qk_norm": self.architecture == "qwen3",
        }
        if self.architecture != "minicpm":
            implied |= {"embedding_scale": 1, "residual_scale": 1, "logit_scale": 1}
        if self.architecture == "gemma":
            implied["embedding_scale"] = math.sqrt(self.hidden_size)
        for name, value in implied.items():
            if getattr(self, name) != value:
                raise ValueError(f"a {self.architecture} file cannot hold {name} = {getattr(self, name)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, not {value!r}")
