"""Where the bytes of a decoded token go: weight sizes by part of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

_PARTS = {"self_attn": "attention", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of the weights that one decoded token reads when every neuron is active."""

    attention: int = 0
    gate: int = 0
    up: int = 0
    down: int = 0
    head: int = 0
    norms: int = 0  # and the token's row of the embedding

    @classmethod
    def of(cls, nbytes: Mapping[str, int], vocab_size: int) -> Self:
        """From the sizes of all tensors by Hugging Face name, as the engine holds them."""
        embedding = nbytes["model.embed_tokens.weight"]
        sizes = dict.fromkeys(cls.__dataclass_fields__, 0)
        sizes["head"] = nbytes.get("lm_head.weight", embedding)  # tied: the embedding is the head
        sizes["norms"] = embedding // vocab_size
        for name, size in nbytes.items():
            if name.startswith("model.layers.") or name == "model.norm.weight":
                sizes[next((part for key, part in _PARTS.items() if key in name), "norms")] += size
        return cls(**sizes)

    def per_token(self, density: float = 1.0) -> dict[str, float]:
        """Bytes by part when only `density` of the up and down rows are read."""
        return {
            "attention": self.attention,
            "FFN gate": self.gate,
            "FFN up": self.up * density,
            "FFN down": self.down * density,
            "head": self.head,
            "norms, embedding": self.norms,
        }
