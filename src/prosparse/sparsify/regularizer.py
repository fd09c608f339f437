"""What training measures and penalises on x1 = act(gate x) * up x (Eq. 2 of the paper)."""

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["mean", "sum1e-8"]
_EPSILON = 1e-12


def l1(x1: Tensor, norm: Norm = "mean") -> Tensor:
    """One layer's share of the L1 loss, a float32 scalar; the loss is lambda times the sum over layers.

    `x1`: [..., d_ff]. "mean" is over all elements and so does not depend on the batch; "sum1e-8" is the
    authors' code (BlockFFN, activation_context.py): 1e-8 times the sum over the local micro-batch. They are
    equal where tokens * d_ff = 1e8.
    """
    if norm == "mean":
        return x1.abs().mean(dtype=torch.float32)
    if norm == "sum1e-8":
        return x1.abs().sum(dtype=torch.float32) * 1e-8
    raise ValueError(f"the L1 norm is mean or sum1e-8, not {norm!r}")


def concentration(x1: Tensor) -> Tensor:
    """Mean over tokens of |x1|_1 / (|x1|_2 sqrt(d_ff)): 1 if all are equal, 1 / sqrt(d_ff) for a single one.

    Unlike `l1` it cannot be lowered by shrinking x1 and growing down_proj. `x1`: [..., d_ff].
    """
    x = x1.float()
    # a token without active neurons has no direction, and its norm no gradient
    norm = (x.square().sum(-1) + _EPSILON).sqrt()
    return (x.abs().sum(-1) / (norm * x.shape[-1] ** 0.5)).mean()


class SparsityCounter:
    """Zeros in x1 by layer, over all tokens added; pooled, as the authors' counter does."""

    def __init__(self, num_layers: int, device: torch.device | str = "cpu") -> None:
        # float64: counts stay exact and one all-reduce takes both
        self._counts = torch.zeros(num_layers, 2, dtype=torch.float64, device=device)

    def add(self, layer: int, x1: Tensor) -> None:
        """Counts one layer's x1 [..., d_ff]."""
        with torch.no_grad():
            self._counts[layer, 0] += (x1 == 0).sum()
            self._counts[layer, 1] += x1.numel()

    @property
    def counts(self) -> Tensor:
        """float64 [layers, 2]: zeros and elements. Sum it over processes before reading the shares."""
        return self._counts

    def per_layer(self) -> Tensor:
        """float64 [layers]: share of zeros; NaN for a layer that saw nothing."""
        return self._counts[:, 0] / self._counts[:, 1]

    def overall(self) -> float:
        """Share of zeros over all layers."""
        zeros, elements = self._counts.sum(0).tolist()
        if not elements:
            raise ValueError("no activations were counted")
        return zeros / elements

    def reset(self) -> None:
        self._counts.zero_()
