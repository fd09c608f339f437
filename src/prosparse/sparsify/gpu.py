"""What keeps a GPU busy: nothing is waited for, and what is done again and again is launched as one."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

_WARM_UP = 3  # calls before recording: what a first one compiles or sets up must not be recorded


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """`values` on a device, without waiting for what a GPU still has to do."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Numbers:
    """Numbers on their way from the device: what is launched after them is not waited for."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


class Replayed:
    """`function` of CUDA tensors to one, recorded as a CUDA graph. Inputs have the shapes of the first call.

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
