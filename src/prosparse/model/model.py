"""A model in memory: configuration, weights by canonical name, raw tokenizer. No files, no execution."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prosparse.model.config import ModelConfig
from prosparse.model.names import expected_tensors
from prosparse.model.tokenizer import TokenizerData

if TYPE_CHECKING:
    from prosparse.model.predictor import Predictors

# GGML type -> (weights per block, bytes per block); a row is a whole number of blocks
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_1": (32, 20),
    "Q4_0": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "Q3_K": (256, 110),
    "Q2_K": (256, 84),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
SIZES = BLOCKS | {"I8": (1, 1)}  # and plain bytes, the codes of adapters


class Tensor:
    """One weight as stored: `type` is the GGML name, `shape` is in numpy order, (rows, columns) or (n,).

    `data` may be given as a function: it is called at each access and its result is not kept, so that
    models larger than memory can be reordered or quantised on their way through.
    """

    __slots__ = ("_data", "shape", "type")

    def __init__(
        self, type: str, shape: tuple[int, ...], data: np.ndarray | Callable[[], np.ndarray]
    ) -> None:
        if type not in SIZES:
            raise ValueError(f"unknown tensor type {type!r}: {', '.join(BLOCKS)} are known")
        if len(shape) not in (1, 2) or min(shape) < 1 or shape[-1] % SIZES[type][0]:
            raise ValueError(
                f"shape {shape} does not fit type {type}: one or two sizes are needed, "
                f"the last a multiple of {SIZES[type][0]}"
            )
        self.type = type
        self.shape = tuple(shape)
        self._data = data
        if isinstance(data, np.ndarray):
            self._check(data)

    @property
    def data(self) -> np.ndarray:
        """uint8, C-contiguous, (rows, row bytes) or (row bytes,); a view of the file where possible."""
        if isinstance(self._data, np.ndarray):
            return self._data
        data = self._data()
        self._check(data)
        return data

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of `data`."""
        block, size = SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // block * size)

    @property
    def nbytes(self) -> int:
        return math.prod(self.data_shape)

    def dequantize(self) -> np.ndarray:
        """float32 of `shape`, by the same arithmetic as llama.cpp."""
        data = self.data
        match self.type:
            case "F32":
                return data.view(np.float32).copy()
            case "F16":
                return data.view(np.float16).astype(np.float32)
            case "BF16":
                return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            case "I8":
                raise ValueError("a tensor of type I8 holds codes, not weights")
        # imported at use: 0.15 s
        from gguf import GGMLQuantizationType, quants

        return quants.dequantize(data, GGMLQuantizationType[self.type]).astype(np.float32, copy=False)

    def _check(self, data: np.ndarray) -> None:
        if data.dtype != np.uint8 or data.shape != self.data_shape or not data.flags.c_contiguous:
            raise ValueError(
                f"tensor data must be contiguous uint8 {self.data_shape}, not {data.dtype} {data.shape}"
            )

    def __repr__(self) -> str:
        return f"Tensor({self.type}, {self.shape})"


def float32(values: np.ndarray) -> Tensor:
    """Numbers as an F32 tensor."""
    return Tensor("F32", values.shape, np.ascontiguousarray(values, np.float32).view(np.uint8))


@dataclass(frozen=True, slots=True)
class Model:
    """A complete model. ValueError names the first tensor that is missing, unexpected or of a wrong shape."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]  # by HF name, rows in HF order
    tokenizer: TokenizerData
    name: str
    predictors: "Predictors | None" = None

    def __post_init__(self) -> None:
        expected = expected_tensors(self.config)
        for name, shape in expected.items():
            if name not in self.tensors:
                raise ValueError(f"tensor {name} is missing")
            if self.tensors[name].shape != shape:
                raise ValueError(
                    f"tensor {name} has shape {self.tensors[name].shape}, the config says {shape}"
                )
        for name in self.tensors:
            if name not in expected:
                raise ValueError(f"tensor {name} is not part of a {self.config.architecture} model")
        if self.predictors is not None:
            self.predictors.check(self.config)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
