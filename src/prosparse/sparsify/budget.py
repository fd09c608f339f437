"""Bytes of codes that train: while their file would be too large, changes are drawn back harder."""

import torch

from prosparse.model.adapter import Adapter
from prosparse.model.coded import Coded, encoded
from prosparse.sparsify.coded import GridLinear, codes_of
from prosparse.sparsify.distributed import World
from prosparse.sparsify.hf_model import Trunk
from prosparse.sparsify.rounding import INFO

_EVERY = 50  # steps between two measurements
_SAMPLE = 32  # every so many-th row is encoded for one
# a file that is 1 % too large takes 0.7 % of all changes until the next one, and 0.1 % from then on
_AT_ONCE, _FROM_NOW_ON = 0.7, 0.1


class Budget:
    """Of the codes of `student`, which are still those of `start`, for a file of `limit` bytes or, without
    one, of as many as that of `start`.

    All processes of `world` must make it and call its methods. ValueError if nothing is left for codes.
    """

    def __init__(self, student: Trunk, start: Adapter, limit: int | None, world: World | None = None) -> None:
        self._world, self._device = world or World(), student.head.device
        self._layers = [module for module in student.modules() if isinstance(module, GridLinear)]
        changes = [change for change in start.matrices.values() if isinstance(change, Coded)]
        self._streams = sum(change.stream.nbytes for change in changes)
        self._fixed = start.size_bytes - self._streams + INFO * (len(start.vectors) + 4 * len(changes))
        self.limit = self._fixed + self._streams if limit is None else limit
        if self.limit <= self._fixed:
            raise ValueError(
                f"an adapter of {self.limit / 1e6:.3g} MB is too small: without any codes it has "
                f"{self._fixed / 1e6:.3g} MB"
            )
        self._sampled = self._sample()
        # bytes of the file, and the share of changes that has to go between any two measurements
        self.state = torch.tensor([self._fixed + self._streams, 0.0], dtype=torch.float64)

    @property
    def size(self) -> int:
        """Bytes of the file when it was last measured, by what some of its rows have grown."""
        return round(float(self.state[0]))

    def share(self, step: int) -> float:
        """Of every change, how much of it is to go after `step`, from 1."""
        if step % _EVERY == 1:
            size = self._fixed + self._streams * self._sample() / self._sampled
            needed = float(self.state[1]) + _FROM_NOW_ON * (size / self.limit - 1)
            self.state.copy_(torch.tensor([size, max(0.0, needed)], dtype=torch.float64))
        size, needed = self.state.tolist()
        return max(0.0, needed + _AT_ONCE * (size / self.limit - 1)) / _EVERY

    @torch.no_grad()
    def _sample(self) -> float:
        """Bytes of some rows, the same for all processes, whose pulls must not differ."""
        found, rows = 0, slice(None, None, _SAMPLE)
        for layer in self._layers:
            codes = codes_of(layer.weight[rows], layer.steps[rows], layer.column_steps)
            found += encoded(codes.to(torch.int16).cpu().numpy()).nbytes
        return float(self._world.mean(torch.tensor([found], dtype=torch.float64, device=self._device)))
