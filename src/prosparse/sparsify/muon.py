"""Muon (Jordan et al. 2024): momentum whose singular values are made equal, for the matrices of a model.

Matrices of one shape are done together, as a few large products instead of thousands of small ones.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prosparse.sparsify.distributed import full

# Newton-Schulz of fifth order: singular values from 0 to 1 come near 1 in five rounds, but not exactly there
_A, _B, _C, _ROUNDS = 3.4445, -4.7750, 2.0315, 5
_AS_ADAMW = 0.2  # the root mean square of AdamW's steps (Liu et al. 2025, arXiv 2502.16982): rates carry over


class Muon(torch.optim.Optimizer):
    """Steps of `lr` * 0.2 sqrt(max(rows, columns)) along orthogonalised momentum, without weight decay.

    The same as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, faster, and for parameters that are spread
    over processes too.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon is for matrices, not for shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[tuple(parameter.shape)].append(parameter)
            for shape, parameters in alike.items():
                rate = group["lr"] * _AS_ADAMW * math.sqrt(max(shape))
                momenta = [full(self._momentum(p, group["momentum"])).bfloat16() for p in parameters]
                for parameter, step in zip(parameters, orthogonal(torch.stack(momenta)), strict=True):
                    parameter.add_(_share(step.to(parameter.dtype), parameter), alpha=-rate)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns], each with singular values near 1 and its singular vectors kept."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def _share(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor, spread as `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor

    spread: Any = parameter
    part = whole.chunk(spread.device_mesh.size())
    rank = spread.device_mesh.get_local_rank()
    mine = part[rank] if rank < len(part) else whole[:0]  # fewer rows than processes
    result: Tensor = DTensor.from_local(
        mine,
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return result
