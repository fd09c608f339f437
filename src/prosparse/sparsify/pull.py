"""Weights drawn back to the original's: what the loss does not need to change returns.

L2-SP (Li et al. 2018, arXiv 1802.01483), apart from gradients, as the decay of AdamW is.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from prosparse.sparsify.coded import CodedLinear
from prosparse.sparsify.hf_model import Trunk


class Pull:
    """Of the matrices of a student's layers, to those of the original; of coded changes, to none.

    `weight` of a matrix, by its name: a step moves it by this times the step's share of the way that is left,
    but never past it. The original may be left out if all matrices are coded. ValueError for what
    adapters add, of which the original has nothing.
    """

    def __init__(self, student: Trunk, original: Trunk | None, weight: Callable[[str], float]) -> None:
        changes = {f"{name}.weight" for name, m in student.named_modules() if isinstance(m, CodedLinear)}
        matrices, theirs = student.matrices(), dict(original.named_parameters() if original else [])
        if not matrices.keys() <= theirs.keys() | changes:
            raise ValueError("what adapters (--lora) add cannot be drawn back to the original's weights")
        self._changes: dict[float, list[Tensor]] = defaultdict(list)
        self._weights: dict[float, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, matrix in matrices.items():
            if name in changes:
                self._changes[weight(name)].append(matrix)
            else:
                ours, originals = self._weights[weight(name)]
                ours.append(matrix)
                # as precise as the student's, and so a copy
                originals.append(theirs[name].detach().to(matrix.dtype))

    @torch.no_grad()
    def step(self, share: float) -> None:
        """After the optimizer's."""
        for weight, changes in self._changes.items():
            torch._foreach_mul_(changes, 1 - min(1.0, share * weight))
        for weight, (weights, theirs) in self._weights.items():
            torch._foreach_lerp_(weights, theirs, min(1.0, share * weight))
