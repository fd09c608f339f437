"""FFN activations: the one definition that every engine and format is tested against."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

NAMES = ("silu", "relu", "fatrelu", "shiftrelu", "gelu")
_ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_tanh": "gelu"}
_NEEDS_PARAM = ("fatrelu", "shiftrelu")


@dataclass(frozen=True, slots=True)
class Activation:
    """A gate activation. `gelu` is the tanh form, as in GGUF files; HF's plain "gelu" is the erf form."""

    name: str = "silu"
    param: float = 0.0  # threshold of fatrelu, shift of shiftrelu; 0 for the others

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown activation {self.name!r}: known are {', '.join(NAMES)}")
        if not math.isfinite(self.param):
            raise ValueError(f"hidden_act_param of {self.name} must be finite, not {self.param}")
        if self.param and self.name not in _NEEDS_PARAM:
            raise ValueError(f"{self.name} takes no hidden_act_param, but {self.param} was given")

    @classmethod
    def parse(cls, name: str, param: float | None = None) -> Self:
        """From a config's `hidden_act` and `hidden_act_param`; `fatrelu_0.01` is understood too.

        Raises ValueError for an unknown name, a missing threshold, or a threshold given twice.
        """
        if not isinstance(name, str):
            raise ValueError(f"hidden_act must be a string, not {name!r}")
        if param is not None and (isinstance(param, bool) or not isinstance(param, int | float | np.number)):
            raise ValueError(f"hidden_act_param must be a number, not {param!r}")
        base, underscore, suffix = name.partition("_")
        if base in _NEEDS_PARAM and underscore:
            try:
                value = float(suffix)
            except ValueError:
                raise ValueError(f"unknown activation {name!r}: write {base}_<number>") from None
            if param is not None and param != value:
                raise ValueError(f"hidden_act {name!r} contradicts hidden_act_param {param}")
            name, param = base, value
        name = _ALIASES.get(name, name)
        if name in _NEEDS_PARAM and param is None:
            raise ValueError(f"{name} needs hidden_act_param (its threshold)")
        return cls(name, float(param or 0.0))

    @property
    def sparse(self) -> bool:
        """Whether outputs can be exactly zero, so that neurons can be skipped without loss."""
        return self.name in ("relu", "fatrelu", "shiftrelu")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Elementwise on float32. FATReLU keeps x >= t, as the paper writes it (vLLM keeps x > t)."""
        t = np.float32(self.param)
        match self.name:
            case "relu":
                return np.maximum(x, np.float32(0))
            case "fatrelu":
                return np.where(x >= t, x, np.float32(0))
            case "shiftrelu":
                return np.maximum(x - t, np.float32(0))
            case "gelu":
                inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
                return np.float32(0.5) * x * (1 + np.tanh(inner))
            case _:
                # exp may overflow to inf for very negative x, where x / inf = -0 is the right limit
                with np.errstate(over="ignore"):
                    return x / (1 + np.exp(-x))
