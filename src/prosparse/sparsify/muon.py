"""Muon (Jordan et al. 2024): momentum whose singular values are made equal, for the matrices of a model.

Matrices of one shape are done together, as a few large products instead of thousands of small ones, and where
several processes hold the same model each does its share of them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from prosparse.sparsify.distributed import World, full

# Newton-Schulz of fifth order: singular values from 0 to 1 come near 1 in five rounds, but not exactly there
_A, _B, _C, _ROUNDS = 3.4445, -4.7750, 2.0315, 5
_AS_ADAMW = 0.2  # the root mean square of AdamW's steps (Liu et al. 2025, arXiv 2502.16982): rates carry over


class Muon(torch.optim.Optimizer):
    """Steps of `lr` * 0.2 sqrt(max(rows, columns)) along orthogonalised momentum, without weight decay.

    The same as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, faster, and for parameters that are spread
    over processes too. All processes of a `world` must take its steps, and with the same gradients.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.95, world: World | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._world = world or World()
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
                steps = self._orthogonal(self._momenta(parameters, group["momentum"]))
                moves = [_share(step, p) for step, p in zip(steps, parameters, strict=True)]
                torch._foreach_add_(parameters, moves, alpha=-rate)

    def _momenta(self, parameters: Sequence[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov's."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        kept = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(kept, gradients, 1 - momentum)
        ahead: list[Tensor] = torch._foreach_lerp(gradients, kept, momentum)
        return ahead

    def _orthogonal(self, momenta: Sequence[Tensor]) -> Tensor:
        """[n, rows, columns], whole and as precise as the parameters."""
        world, kind = self._world, momenta[0].dtype
        if world.size == 1 or world.sharded:
            return orthogonal(torch.stack([full(m).bfloat16() for m in momenta])).to(kind)
        each = -(-len(momenta) // world.size)
        share = torch.zeros(each, *momenta[0].shape, dtype=torch.bfloat16, device=momenta[0].device)
        if mine := momenta[world.rank :: world.size]:
            share[: len(mine)] = orthogonal(torch.stack(mine).bfloat16())
        return world.gathered(share).transpose(0, 1).flatten(0, 1)[: len(momenta)].to(kind)


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
