"""Weights drawn back to the original's: what the loss does not need to change returns.

L2-SP (Li et al. 2018, arXiv 1802.01483), apart from gradients, as the decay of AdamW is.
"""

import torch

from prosparse.sparsify.coded import CodedLinear
from prosparse.sparsify.hf_model import Trunk


class Pull:
    """Of the matrices of a student's layers, to those of the original; of coded changes, to none.

    `weight`: a step moves them by this times the learning rate of the way that is left, but never past it.
    """

    def __init__(self, student: Trunk, original: Trunk, weight: float) -> None:
        self._weight = weight
        theirs = dict(original.named_parameters())
        changes = {
            f"{name}.weight" for name, module in student.named_modules() if isinstance(module, CodedLinear)
        }
        ends = {id(student.head), id(student.embedding)}
        matrices = [
            (name, p)
            for name, p in student.named_parameters()
            if p.requires_grad and p.ndim == 2 and id(p) not in ends
        ]
        if missing := [name for name, _ in matrices if name not in theirs]:
            raise ValueError(f"the original has no {missing[0]}: what --lora adds cannot be drawn back to it")
        self._changes = [p for name, p in matrices if name in changes]
        self._weights = [p for name, p in matrices if name not in changes]
        # as precise as the student's, and so copies
        self._theirs = [theirs[name].detach().to(p.dtype) for name, p in matrices if name not in changes]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """After the optimizer's, at its learning rate."""
        share = min(1.0, rate * self._weight)
        if self._changes:
            torch._foreach_mul_(self._changes, 1 - share)
        if self._weights:
            torch._foreach_lerp_(self._weights, self._theirs, share)
