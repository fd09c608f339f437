"""Training changes that fit into a bit or two a weight: codes times a step for each row, found anew from the
change after every update, or codes of an adapter, whose steps of rows and columns stay.

The latent change is what the optimizer moves; the forward pass sees its codes, and gradients pass through the
rounding as if it were not there (straight-through, Bengio et al. 2013). Two levels are those of BitDelta (Liu
et al. 2024, arXiv 2402.10193), three those of Ternary Weight Networks (Li et al. 2016, arXiv 1605.04711), and
five go on as these do.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosparse.model import adapter
from prosparse.model.adapter import Adapter
from prosparse.model.coded import Coded, encoded, float16
from prosparse.model.config import ModelConfig
from prosparse.model.model import Model
from prosparse.model.names import less_one_in_hf

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk

_TINY, _MOST = 1e-30, 32767.0  # of a step that is a divisor; of codes
_ROUNDING = 1e-4  # of scales
# levels -> sizes above which codes are 1 and 2, in mean sizes of a row. Three: Eq. 6 of Ternary Weight
# Networks. Five: half a step and one and a half, where a step is 1.12. Of a normal row's square that leaves
# 8.3 %, and 8.2 % is the least; of a Laplace-distributed one's 14.4 %, and 13.3 % is.
_OPEN = {3: (0.7,), 5: (0.56, 1.68)}


def parse_levels(text: str) -> dict[str, int]:
    """Those of `adapter.parse_levels`: kinds with 0, which are not to train, are left out."""
    levels = adapter.parse_levels(text)
    if not levels:
        raise ValueError(f"levels are 2, 3 or 5 of some matrices at least, as 3:0, not {text!r}")
    return levels


class CodedLinear(nn.Module):
    """x (base + codes times steps)^T: `base` [rows, columns] stays, `weight` is the latent change."""

    base: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.register_buffer("base", linear.weight.detach().clone(), persistent=False)
        self.weight = nn.Parameter(torch.zeros_like(linear.weight))

    def rounded(self, change: Tensor) -> Tensor:
        """What the forward pass sees of a latent change; gradients pass."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base + self.rounded(self.weight), self.bias)


class LevelLinear(CodedLinear):
    """In two, three or five levels of a step a row."""

    def __init__(self, linear: nn.Linear, levels: int) -> None:
        super().__init__(linear)
        self.levels = levels

    def rounded(self, change: Tensor) -> Tensor:
        result: Tensor = _Coded.apply(change, self.levels)
        return result


class GridLinear(CodedLinear):
    """In whole numbers of the steps of `change`, whose codes it begins with."""

    steps: Tensor
    column_steps: Tensor

    def __init__(self, linear: nn.Linear, change: Coded) -> None:
        super().__init__(linear)
        steps, column_steps = _steps(change)
        self.register_buffer("steps", steps.to(self.base.device), persistent=False)
        self.register_buffer("column_steps", column_steps.to(self.base.device), persistent=False)
        with torch.no_grad():
            codes = torch.from_numpy(change.codes()).to(self.weight)
            self.weight.copy_(codes * self.steps * self.column_steps)

    def rounded(self, change: Tensor) -> Tensor:
        result: Tensor = _OnGrid.apply(change, self.steps, self.column_steps)
        return result


def _steps(change: Coded) -> tuple[Tensor, Tensor]:
    """float32 [rows, 1] and [columns]."""
    columns = np.ones(change.columns, np.float32)
    if change.column_steps is not None:
        columns = change.column_steps.dequantize()
    return torch.from_numpy(change.steps.dequantize())[:, None], torch.from_numpy(columns)


def codes_of(change: Tensor, steps: Tensor, column_steps: Tensor) -> Tensor:
    """The nearest whole numbers; 0 where a step is."""
    size = steps * column_steps
    return torch.where(size > 0, change / size.clamp(min=_TINY), 0.0).round().clamp(-_MOST, _MOST)


def coded(change: Tensor, levels: int) -> Tensor:
    """What is left of a change [rows, columns]: codes (-1 and 1; of three levels also 0, of five also -2 and
    2) times a step, which is one of each row and has a float16 form."""
    size = change.abs()
    if levels == 2:
        step = size.mean(1, keepdim=True)
        codes = torch.where(change < 0, -1.0, 1.0)
    else:
        mean = size.mean(1, keepdim=True)
        codes = torch.zeros_like(change)
        for limit in _OPEN[levels]:
            codes = codes + change.sign() * (size > limit * mean)
        step = (change * codes).sum(1, keepdim=True) / (codes * codes).sum(1, keepdim=True).clamp(min=1)
    return codes * step.half().to(change.dtype)


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, change: Tensor, levels: int) -> Tensor:
        return coded(change, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, change: Tensor, steps: Tensor, column_steps: Tensor) -> Tensor:
        return codes_of(change, steps, column_steps) * steps * column_steps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def add(trunk: "Trunk", levels: Mapping[str, int], start: Model) -> int:
    """Puts coded changes into projections, in place, of the levels of their kind (`q_proj`, ...), which
    begin as the difference to `start`; the number of parameters that then train.

    Changes and vectors (norms, biases) train. Embedding, head and kinds without levels do not, and stay as
    the trunk has them.
    """
    for parameter in trunk.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    vectors = dict(trunk.model.named_parameters())
    with torch.no_grad():
        for name, tensor in start.tensors.items():
            values = torch.from_numpy(tensor.dequantize() - less_one_in_hf(start.config, name))
            layer, _, _ = name.rpartition(".weight")
            kind = layer.rpartition(".")[2]
            if len(tensor.shape) == 1:
                vectors[name].copy_(values)
            elif kind in levels:
                module = LevelLinear(trunk.model.get_submodule(layer), levels[kind])
                module.weight.copy_(values.to(module.base) - module.base)
                trunk.model.set_submodule(layer, module)
    return sum(p.numel() for p in trunk.parameters() if p.requires_grad)


def add_grid(trunk: "Trunk", start: Adapter, config: ModelConfig) -> int:
    """Puts the codes of an adapter for the trunk's model into projections, in place, and its vectors; the
    number of parameters that then train. Embedding and head do not, and folded thresholds are taken apart.
    ValueError for factors, and for scales that are not of folding."""
    _check_scales(start)
    for parameter in trunk.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    vectors = dict(trunk.model.named_parameters())
    with torch.no_grad():
        for name, tensor in start.vectors.items():
            vectors[name].copy_(torch.from_numpy(tensor.dequantize() - less_one_in_hf(config, name)))
    for name, change in start.matrices.items():
        assert isinstance(change, Coded)
        layer = name.removesuffix(".weight")
        trunk.model.set_submodule(layer, GridLinear(trunk.model.get_submodule(layer), change))
    return sum(p.numel() for p in trunk.parameters() if p.requires_grad)


def _check_scales(start: Adapter) -> None:
    for name, change in start.matrices.items():
        if not isinstance(change, Coded):
            raise ValueError(f"the adapter has factors of {name}: codes of all matrices are needed")
        scale = change.scale
        if adapter.kind_of(name) == "up_proj":
            scale *= start.matrices[name.replace("up_proj", "gate_proj")].scale
        if adapter.kind_of(name) != "gate_proj" and abs(scale - 1) > _ROUNDING:
            raise ValueError(f"the adapter scales {name} by {scale:g}, and codes alone are trained")


def changes(model: nn.Module) -> dict[str, Coded]:
    """Those on a grid, as they are now, by the names of their matrices."""
    result = {}
    for name, module in model.named_modules():
        if isinstance(module, GridLinear):
            steps, column_steps = module.steps, module.column_steps
            codes = codes_of(module.weight.detach(), steps, column_steps).cpu().numpy()
            rows, columns = (float16(values.flatten().cpu().numpy()) for values in (steps, column_steps))
            result[f"{name}.weight"] = Coded(1.0, codes.shape[1], rows, columns, encoded(codes))
    return result


def merged(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`parameters` (whole tensors by name) with what their changes make of the base."""
    result = dict(parameters)
    for name, module in model.named_modules():
        if isinstance(module, CodedLinear):
            change = parameters[f"{name}.weight"].to(module.base.device)
            result[f"{name}.weight"] = (module.base + module.rounded(change)).detach().cpu()
    return result
