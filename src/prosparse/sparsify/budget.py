"""Bytes of codes that train: while their file would be too large, changes are drawn back harder."""

import math

import torch

from prosparse.formats.adapter import entries_size
from prosparse.model.adapter import Adapter
from prosparse.model.coded import Coded, encoded
from prosparse.sparsify.coded import GridLinear, codes_of
from prosparse.sparsify.distributed import World
from prosparse.sparsify.hf_model import Trunk

_EVERY = 50  # steps between two measurements
_SAMPLE = 32  # every so many-th row is encoded for one
# a file that is 1 % too large takes 0.7 % of all changes until the next one, and 0.1 % from then on
_AT_ONCE, _FROM_NOW_ON = 0.7, 0.1


def limit(start: Adapter, megabytes: float | None) -> int:
    """Bytes that a file may have which begins as `start`: None is as many as it has. ValueError if nothing is
    left for codes."""
    fixed, streams = _sizes(start)
    if megabytes is None:
        return fixed + streams
    if not fixed < megabytes * 1e6 < math.inf:
        raise ValueError(
            f"a size is in MB, and above the {fixed / 1e6:.3g} that the adapter has without any codes, not "
            f"{megabytes:g}"
        )
    return round(megabytes * 1e6)


def _sizes(start: Adapter) -> tuple[int, int]:
    """Bytes of all but codes, and of codes."""
    changes = [change for change in start.matrices.values() if isinstance(change, Coded)]
    streams = sum(change.stream.nbytes for change in changes)
    return start.size_bytes - streams + entries_size(len(start.vectors), len(changes)), streams


class Budget:
    """Of the codes of `student`, which are still those of `start`, for a file of `limit` bytes.

    All processes of `world` must make it and call its methods.
    """

    def __init__(self, student: Trunk, start: Adapter, limit: int, world: World | None = None) -> None:
        self._world, self._device, self._limit = world or World(), student.head.device, limit
        self._layers = [module for module in student.modules() if isinstance(module, GridLinear)]
        self._fixed, self._streams = _sizes(start)
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
            needed = float(self.state[1]) + _FROM_NOW_ON * (size / self._limit - 1)
            self.state.copy_(torch.tensor([size, max(0.0, needed)], dtype=torch.float64))
        size, needed = self.state.tolist()
        return max(0.0, needed + _AT_ONCE * (size / self._limit - 1)) / _EVERY

    @torch.no_grad()
    def _sample(self) -> float:
        """Bytes of some rows, the same for all processes, whose pulls must not differ."""
        found, rows = 0, slice(None, None, _SAMPLE)
        for layer in self._layers:
            codes = codes_of(layer.weight[rows], layer.steps[rows], layer.column_steps)
            found += encoded(codes.to(torch.int16).cpu().numpy()).nbytes
        return float(self._world.mean(torch.tensor([found], dtype=torch.float64, device=self._device)))
