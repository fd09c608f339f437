"""Sparse activations for transformers: what `from_pretrained(folder, trust_remote_code=True)` runs.

transformers knows neither FATReLU nor shifted ReLU. The model is its own class with the activation of
config.json in every gated MLP: `hidden_act`, with `hidden_act_param` as the threshold or the shift.
Written by prosparse beside the weights, with the class of their architecture in Llama's place.
"""

import ctypes
import math

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.activations import ACT2FN

_NAMES = ("fatrelu", "shiftrelu")
_KEYS = ("hidden_act", "hidden_activation")  # Gemma has the second too


class ThresholdedReLU(nn.Module):
    """FATReLU: x where x >= threshold, else 0. Shifted ReLU: max(x - threshold, 0). Any shape and float type.

    Compared and subtracted in float32: most thresholds have no bfloat16 form.
    """

    def __init__(self, name: str, threshold: float) -> None:
        super().__init__()
        self.name = name
        # a number, not a buffer: a buffer would be lost on the meta device and rounded by .to(bfloat16)
        self.threshold = ctypes.c_float(threshold).value

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "fatrelu":
            return torch.where(x.float() >= self.threshold, x, 0.0)
        return torch.relu(x.float() - self.threshold).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.threshold}"


class ProSparseLlamaForCausalLM(LlamaForCausalLM):
    """The native class, with fatrelu and shiftrelu too. ValueError for any other unknown activation."""

    def __init__(self, config) -> None:
        name, threshold = config.hidden_act, getattr(config, "hidden_act_param", None)
        keys = [key for key in _KEYS if getattr(config, key, None) is not None]
        if any(getattr(config, key) != name for key in keys) and _is_ours(config):
            raise ValueError(f"config.json: {' and '.join(keys)} contradict each other")
        if name in ACT2FN:
            super().__init__(config)
            return
        if name not in _NAMES:
            raise ValueError(
                f"hidden_act {name!r} is neither {' or '.join(_NAMES)} nor one of transformers' own"
            )
        if not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise ValueError(f"{name} needs a number as hidden_act_param, not {threshold!r}")
        # the native constructor looks the name up; the config, which is saved again, keeps ours
        for key in keys:
            setattr(config, key, "relu")
        try:
            super().__init__(config)
        finally:
            for key in keys:
                setattr(config, key, name)
        mlps = [m for m in self.modules() if hasattr(m, "gate_proj") and hasattr(m, "act_fn")]
        if len(mlps) != config.num_hidden_layers:
            raise ValueError(f"{len(mlps)} gated MLPs with an act_fn in {config.num_hidden_layers} layers")
        for mlp in mlps:
            mlp.act_fn = ThresholdedReLU(name, threshold)


def _is_ours(config) -> bool:
    return any(getattr(config, key, None) in _NAMES for key in _KEYS)
