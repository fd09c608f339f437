"""Rotary frequencies after context scaling, with the formulas of the models that define them."""

import math
from dataclasses import dataclass

import numpy as np

TYPES = ("linear", "llama3", "yarn", "factors")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a model stretches its rotary frequencies; fields have their HF names.

    `factors` divides each frequency by its own number, as GGUF's `rope_freqs.weight` does.
    """

    type: str
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn: context length before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: cos and sin are multiplied by it; None = from `factor`
    factors: tuple[float, ...] = ()  # head_dim/2 numbers

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"rope_scaling type {self.type!r} is not supported: {', '.join(TYPES)} are")
        numbers = {
            name: getattr(self, name)
            for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        }
        if self.attention_factor is not None:
            numbers["attention_factor"] = self.attention_factor
        numbers |= {f"factors[{i}]": value for i, value in enumerate(self.factors)}
        for name, value in numbers.items():
            if not 1e-6 <= value <= 1e6:
                raise ValueError(f"rope_scaling {name} must be between 1e-6 and 1e6, not {value}")
        if self.type in ("llama3", "yarn") and not 1 <= self.original_max_position_embeddings < 2**31:
            raise ValueError(f"rope_scaling type {self.type} needs original_max_position_embeddings")
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("rope_scaling high_freq_factor must be greater than low_freq_factor")

    def frequency_divisors(self, head_dim: int, theta: float) -> np.ndarray:
        """float64 [head_dim/2]: what each unscaled frequency is divided by."""
        frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        match self.type:
            case "linear":
                return np.full(head_dim // 2, self.factor)
            case "factors":
                if len(self.factors) != head_dim // 2:
                    raise ValueError(
                        f"rope factors: {len(self.factors)} numbers, head_dim/2 = {head_dim // 2}"
                    )
                return np.array(self.factors)
            case "llama3":
                # long waves are divided by factor, short ones kept, linear blend of frequencies between
                turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
                keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            case _:
                low, high = (
                    self._yarn_dim(beta, head_dim, theta) for beta in (self.beta_fast, self.beta_slow)
                )
                low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
                width = high - low or 0.001
                keep = 1 - (np.arange(head_dim // 2) - low) / width
        keep = np.clip(keep, 0, 1)
        return 1 / (keep + (1 - keep) / self.factor)

    def _yarn_dim(self, rotations: float, head_dim: int, theta: float) -> float:
        """The (fractional) dimension whose wave turns `rotations` times over the original context."""
        context = self.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def cos_sin_scale(self) -> float:
        """What cos and sin are multiplied by (yarn's attention factor, 1 for the others)."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
