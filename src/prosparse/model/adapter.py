"""Adapters: what training has added to a model, as low-rank factors in 8 bits.

Each matrix of a layer becomes `scale * W + B diag(steps) A`. Thresholds that are folded into gate and up, and
weight decay, multiply whole matrices, which no low rank can hold: hence the scale. Vectors are kept whole;
embedding and head stay as they are.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from prosparse.model.activation import Activation
from prosparse.model.model import Model, Tensor

FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")
_ROUNDS, _TOLERANCE = 12, 1e-5  # of the search for a scale: its error is far below that of 8 bits


@dataclass(frozen=True, slots=True)
class Factors:
    """The change of one matrix [rows, columns]."""

    scale: float
    steps: np.ndarray  # float32 [rank]: what 1 in column k of `b` times 1 in row k of `a` is worth
    a: np.ndarray  # int8 [rank, columns]
    b: np.ndarray  # int8 [rows, rank]

    def __post_init__(self) -> None:
        rank = len(self.steps)
        if self.a.ndim != 2 or self.b.ndim != 2 or len(self.a) != rank or self.b.shape[1] != rank:
            raise ValueError(f"factors {self.b.shape} and {self.a.shape} with {rank} steps do not match")
        if not (math.isfinite(self.scale) and np.isfinite(self.steps).all()):
            raise ValueError("NaN or infinite scale or steps")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return len(self.b), self.a.shape[1]

    def merged(self, base: np.ndarray) -> np.ndarray:
        """float32 of `shape`: the changed matrix."""
        return np.float32(self.scale) * base + (self.b * self.steps) @ self.a.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What makes another model of the one whose `fingerprint` is `base`."""

    base: str  # hex
    activation: Activation
    matrices: Mapping[str, Factors]  # by tensor name: every matrix but embedding and head
    vectors: Mapping[str, np.ndarray]  # float32 [n] by tensor name: norms, and biases where there are any
    name: str  # of the model that it makes
    license: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)  # free, ready for JSON

    def __post_init__(self) -> None:
        for name, values in self.vectors.items():
            if not np.isfinite(values).all():
                raise ValueError(f"tensor {name}: NaN or infinite values")

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        factors = sum(f.a.nbytes + f.b.nbytes + f.steps.nbytes + 4 for f in self.matrices.values())
        return factors + sum(values.nbytes for values in self.vectors.values())


def fingerprint(model: Model) -> str:
    """sha256, in hex, of all weights: by name, "NAME TYPE ROWSxCOLUMNS\\n", then the data of the tensor."""
    digest = hashlib.sha256()
    for name in sorted(model.tensors):
        tensor = model.tensors[name]
        digest.update(f"{name} {tensor.type} {'x'.join(map(str, tensor.shape))}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def apply(base: Model, adapter: Adapter) -> Model:
    """The model that `adapter` makes of `base`, without predictors; its matrices are F32, merged whenever
    their data is asked for. ValueError if it is of another model."""
    shapes: dict[str, tuple[int, ...]] = {name: factors.shape for name, factors in adapter.matrices.items()}
    shapes |= {name: values.shape for name, values in adapter.vectors.items()}
    expected = {name: tensor.shape for name, tensor in base.tensors.items() if name not in _TOKENS}
    for name in expected | shapes:
        if shapes.get(name) != expected.get(name):
            has, wants = (s.get(name, "no such tensor") for s in (shapes, expected))
            raise ValueError(f"tensor {name}: the adapter {adapter.name} has {has}, {base.name} has {wants}")
    if (found := fingerprint(base)) != adapter.base:
        raise ValueError(
            f"the adapter {adapter.name} is of a model with the fingerprint {adapter.base[:16]}, not of "
            f"{base.name} ({found[:16]}): give the very file, quantised as it was, that it was made from"
        )
    tensors = dict(base.tensors)
    for name, factors in adapter.matrices.items():
        tensors[name] = Tensor("F32", factors.shape, partial(_merged, tensors[name], factors))
    for name, values in adapter.vectors.items():
        tensors[name] = Tensor("F32", values.shape, values.view(np.uint8))
    config = replace(base.config, activation=adapter.activation)
    return Model(config, tensors, base.tokenizer, adapter.name)


def _merged(base: Tensor, factors: Factors) -> np.ndarray:
    return factors.merged(base.dequantize()).view(np.uint8)


def extract(
    base: Model,
    tuned: Model,
    ranks: int | Mapping[str, int],
    *,
    license: str = "",
    measured: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter of these ranks that takes `base` nearest to `tuned`, by squared error.

    `ranks`: one for all, or by kind of matrix (`FFN`, `ATTENTION`); the smaller side of a matrix is enough.
    If `tuned` was trained with adapters of no greater ranks, only the 8 bits are lost. Embedding and head of
    `tuned` are left out: see `change`. ValueError if the two are not of one shape.
    """
    if replace(tuned.config, activation=base.config.activation) != base.config:
        raise ValueError(f"{tuned.name} has another configuration than {base.name}: no adapter leads there")
    if not isinstance(ranks, Mapping):
        ranks = dict.fromkeys((*FFN, *ATTENTION), ranks)
    if sorted(ranks) != sorted((*FFN, *ATTENTION)) or min(ranks.values()) < 1:
        raise ValueError(f"ranks of at least 1 are needed for {', '.join((*FFN, *ATTENTION))}, not {ranks}")
    matrices, vectors = {}, {}
    for name, tensor in tuned.tensors.items():
        if name in _TOKENS:
            continue
        values = tensor.dequantize()
        if not np.isfinite(values).all():
            raise ValueError(f"tensor {name} of {tuned.name}: NaN or infinite values")
        if values.ndim == 1:
            vectors[name] = values
        else:
            matrices[name] = _factors(base.tensors[name].dequantize(), values, ranks[kind_of(name)])
    return Adapter(
        fingerprint(base), tuned.config.activation, matrices, vectors, tuned.name, license, measured or {}
    )


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `up_proj`."""
    return name.split(".")[-2]


def kept(base: Model, tuned: Model, adapter: Adapter) -> dict[str, float]:
    """By kind of matrix: the share of the squared difference, less what scales explain, that is kept."""
    sums = {kind: np.zeros(2) for kind in (*ATTENTION, *FFN)}
    for name, factors in adapter.matrices.items():
        theirs, ours = tuned.tensors[name].dequantize(), base.tensors[name].dequantize()
        rest, whole = theirs - factors.merged(ours), theirs - np.float32(factors.scale) * ours
        sums[kind_of(name)] += np.vdot(rest, rest), np.vdot(whole, whole)
    return {kind: float(1 - rest / whole) if whole else 1.0 for kind, (rest, whole) in sums.items()}


def change(base: Model, tuned: Model) -> float:
    """What an adapter leaves out: the change of the embedding and the head, relative to their size."""
    names = [name for name in _TOKENS if name in base.tensors]
    pairs = [(base.tensors[name].dequantize(), tuned.tensors[name].dequantize()) for name in names]
    squares = sum(float(np.vdot(b - a, b - a)) for a, b in pairs)
    return math.sqrt(squares / sum(float(np.vdot(a, a)) for a, _ in pairs))


def _factors(base: np.ndarray, tuned: np.ndarray, rank: int) -> Factors:
    """Of two float32 matrices of one shape: the truncated singular value decomposition of tuned - s base."""
    if wide := base.shape[0] < base.shape[1]:
        base, tuned = base.T, tuned.T
    rank = min(rank, base.shape[1])
    scale = _scale(base, tuned, rank)
    difference = tuned.astype(np.float64) - scale * base
    right = np.linalg.eigh(difference.T @ difference)[1][:, : -rank - 1 : -1]
    left, left_steps = _int8(difference @ right)
    right, right_steps = _int8(right)
    if wide:
        left, right = right, left
    steps = (left_steps * right_steps).astype(np.float32)
    return Factors(scale, steps, np.ascontiguousarray(right.T), left)


def _scale(base: np.ndarray, tuned: np.ndarray, rank: int) -> float:
    """The s, a float32, for which tuned - s base is nearest to a matrix of this rank.

    In turns: the best directions for s, then the best s for what they leave.
    """
    bb, tb, tt = base.T @ base, tuned.T @ base, tuned.T @ tuned
    whole = np.trace(tb), np.trace(bb)
    scale = whole[0] / whole[1] if whole[1] else 1.0
    for _ in range(_ROUNDS if rank < len(bb) else 0):
        gram = tt - scale * (tb + tb.T) + scale * scale * bb
        taken = np.linalg.eigh(gram)[1][:, -rank:]
        rest = [w - np.vdot(taken, m @ taken) for w, m in zip(whole, (tb, bb), strict=True)]
        before, scale = scale, rest[0] / rest[1]
        if abs(scale - before) <= _TOLERANCE * abs(before):
            break
    return float(np.float32(scale))


def _int8(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [n, rank] and the step of each column."""
    steps = np.abs(columns).max(axis=0) / 127
    return np.rint(columns / np.where(steps, steps, 1)).astype(np.int8), steps
