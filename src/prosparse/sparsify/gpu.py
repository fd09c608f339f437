"""Functions of tensors recorded once as CUDA graphs: a thousand kernels are then launched as one."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_WARM_UP = 3  # calls before recording: what a first one compiles or sets up must not be recorded


class Replayed:
    """`function` of CUDA tensors to one, whose inputs always have the shapes of the first call's.

    It must neither wait for the device nor read what changes, but for tensors changed in place. What it
    returns is overwritten by the next call. `undo` is called after the warm-up, to take back what that did.
    """

    def __init__(self, function: Callable[..., Tensor], undo: Callable[[], None] = lambda: None) -> None:
        self._function, self._undo = function, undo
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._graph is None:
            self._graph = self._record(inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._output

    def _record(self, inputs: Iterable[Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._function(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._undo()
        graph = torch.cuda.CUDAGraph()
        # of this thread alone: NCCL's threads look after their own work meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._output = self._function(*self._inputs)
        return graph
