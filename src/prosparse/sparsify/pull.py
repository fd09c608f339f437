"""Weights drawn back to the original's: what the loss does not need to change returns.

L2-SP (Li et al. 2018, arXiv 1802.01483), apart from gradients, as the decay of AdamW is.
"""

import torch

from prosparse.sparsify.coded import CodedLinear
from prosparse.sparsify.hf_model import Trunk


class Pull:
    """Of the matrices of a student's layers, to those of the original; of coded changes, to none.

    `weight`: a step moves them by this times the learning rate of the way that is left, but never past it.
    ValueError for what adapters add, of which the original has nothing.
    """

    def __init__(self, student: Trunk, original: Trunk, weight: float) -> None:
        self._weight = weight
        changes = {f"{name}.weight" for name, m in student.named_modules() if isinstance(m, CodedLinear)}
        matrices, theirs = student.matrices(), dict(original.named_parameters())
        if not matrices.keys() <= theirs.keys():
            raise ValueError("what adapters (--lora) add cannot be drawn back to the original's weights")
        weights = matrices.keys() - changes
        self._changes = [matrices[name] for name in changes]
        self._weights = [matrices[name] for name in weights]
        # as precise as the student's, and so copies
        self._theirs = [theirs[name].detach().to(matrices[name].dtype) for name in weights]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """After the optimizer's, at its learning rate."""
        share = min(1.0, rate * self._weight)
        if self._changes:
            torch._foreach_mul_(self._changes, 1 - share)
        if self._weights:
            torch._foreach_lerp_(self._weights, self._theirs, share)
