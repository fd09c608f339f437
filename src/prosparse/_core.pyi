"""The native CPU engine: one call per token (decode) or per batch (prefill)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def isa() -> str:
    """Instruction set in use: the best this machine has, or the one `PROSPARSE_ISA` names."""

def isas() -> list[str]:
    """Instruction sets this machine can run, best last."""

def top_k(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and values of the `k` largest logits, largest first, ties by lower id."""

def encode_codes(codes: NDArray[np.int16]) -> NDArray[np.uint8]:
    """A matrix of small integers, range-coded (docs/formats.md, Adapters)."""

def decode_codes(data: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.int16]:
    """The codes [rows, columns] of what `encode_codes` returned. ValueError for other bytes."""

def bandwidth(n_threads: int, megabytes: int = 512) -> float:
    """Measured read bandwidth of memory in GB/s."""

class Model:
    """Packed weights of one model. `config`: the dict of `backend.core_config`; `mode`: exact or dense."""

    mode: str
    skipping: bool
    weight_bytes: int
    n_threads: int
    def __init__(self, config: Mapping[str, Any], n_threads: int, mode: str) -> None: ...
    def set_tensor(
        self, name: str, type: str, shape: Sequence[int], data: NDArray[np.uint8], mapped: bool = False
    ) -> None:
        """Packs (copies) one weight. `mapped`: `data` is a file mapping whose pages may be dropped."""

    def finish(self) -> None: ...
    def forward(
        self, cache: Cache, tokens: NDArray[np.int32], all_logits: bool = False
    ) -> NDArray[np.float32]:
        """Appends tokens to the cache; logits [n or 1, vocab]. Ctrl-C stops it between layers."""

    def stats(self) -> dict[str, int]: ...
    def reset_stats(self) -> None: ...

class Cache:
    """Keys and values of one sequence, float16."""

    n_ctx: int
    n_past: int
    bytes: int
    def __init__(self, model: Model, n_ctx: int) -> None: ...
    def truncate(self, n: int) -> None: ...
