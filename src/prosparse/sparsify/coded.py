"""Training changes that fit into one or two bits a weight: codes times a step for each row.

The latent change is what the optimizer moves; the forward pass sees its codes, and gradients pass through the
rounding as if it were not there (straight-through, Bengio et al. 2013). Two levels are those of BitDelta (Liu
et al. 2024, arXiv 2402.10193), three those of Ternary Weight Networks (Li et al. 2016, arXiv 1605.04711).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosparse.model import adapter
from prosparse.model.adapter import ATTENTION, FFN
from prosparse.model.model import Model
from prosparse.model.names import less_one_in_hf

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk

_OPEN = 0.7  # of a row's mean size: what is smaller has code 0 (Ternary Weight Networks, Eq. 6)


def parse_levels(text: str) -> dict[str, int]:
    """Those of `adapter.parse_levels`, none of them 0: all matrices train."""
    levels = adapter.parse_levels(text)
    if len(levels) < len((*FFN, *ATTENTION)):
        raise ValueError(f"levels are 2 or 3 of every matrix, as 3:2 or 3,gate_proj=2, not {text!r}")
    return levels


class CodedLinear(nn.Module):
    """x (base + step code)^T: `base` [rows, columns] stays, `weight` is the latent change."""

    base: Tensor

    def __init__(self, linear: nn.Linear, levels: int) -> None:
        super().__init__()
        self.levels, self.bias = levels, linear.bias
        self.register_buffer("base", linear.weight.detach().clone(), persistent=False)
        self.weight = nn.Parameter(torch.zeros_like(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = _Coded.apply(self.weight, self.levels)
        return F.linear(x, self.base + change, self.bias)


def coded(change: Tensor, levels: int) -> Tensor:
    """What is left of a change [rows, columns]: -step, 0 (of three levels) or step, which is one of each row
    and has a float16 form."""
    size = change.abs()
    if levels == 2:
        step = size.mean(1, keepdim=True)
        signs = torch.where(change < 0, -1.0, 1.0)
    else:
        signs = change.sign() * (size > _OPEN * size.mean(1, keepdim=True))
        taken = signs.abs()
        step = (size * taken).sum(1, keepdim=True) / taken.sum(1, keepdim=True).clamp(min=1)
    return signs * step.half().to(change.dtype)


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, change: Tensor, levels: int) -> Tensor:
        return coded(change, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def add(trunk: "Trunk", levels: Mapping[str, int], start: Model) -> int:
    """Puts coded changes into every projection, in place, of the levels of its kind (`q_proj`, ...), which
    begin as the difference to `start`; the number of parameters that then train.

    Changes and vectors (norms, biases) train, embedding and head do not.
    """
    trunk.freeze_embeddings()
    vectors = dict(trunk.model.named_parameters())
    with torch.no_grad():
        for name, tensor in start.tensors.items():
            values = torch.from_numpy(tensor.dequantize() - less_one_in_hf(start.config, name))
            layer, _, _ = name.rpartition(".weight")
            kind = layer.rpartition(".")[2]
            if len(tensor.shape) == 1:
                vectors[name].copy_(values)
            elif kind in levels:
                module = CodedLinear(trunk.model.get_submodule(layer), levels[kind])
                module.weight.copy_(values.to(module.base) - module.base)
                trunk.model.set_submodule(layer, module)
    return sum(p.numel() for p in trunk.parameters() if p.requires_grad)


def merged(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`parameters` (whole tensors by name) with what their changes make of the base."""
    result = dict(parameters)
    for name, module in model.named_modules():
        if isinstance(module, CodedLinear):
            change = parameters[f"{name}.weight"]
            result[f"{name}.weight"] = module.base.to(change) + coded(change, module.levels)
    return result
