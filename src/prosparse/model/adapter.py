"""Adapters: what training has added to a model, as low-rank factors.

Each matrix of a layer becomes `scale * W + gain * B^T A`. Folded thresholds and weight decay multiply whole
matrices, which no low rank can hold: hence the scale. Vectors are kept whole; embedding and head stay as they
are.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np

from prosparse.model.activation import Activation
from prosparse.model.model import Model, Tensor

FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")
# what a model may have otherwise than its base: the activation is the adapter's, the others stay the base's
_FREE = ("activation", "bos_token_id", "eos_token_ids", "max_position_embeddings")
_ROUNDS, _TOLERANCE = 20, 1e-5  # of the search for a scale


@dataclass(frozen=True, slots=True)
class Factors:
    """The change of one matrix [rows, columns]."""

    scale: float  # of the matrix itself
    gain: float  # of the product of the factors
    a: Tensor  # [rank, columns]
    b: Tensor  # [rank, rows]

    def __post_init__(self) -> None:
        if len(self.a.shape) != 2 or len(self.b.shape) != 2 or self.a.shape[0] != self.b.shape[0]:
            raise ValueError(f"factors of shapes {self.a.shape} and {self.b.shape} are not of one rank")
        if not (math.isfinite(self.scale) and math.isfinite(self.gain)):
            raise ValueError(f"NaN or infinite scales {self.scale}, {self.gain}")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.b.shape[1], self.a.shape[1]

    def merged(self, base: np.ndarray) -> np.ndarray:
        """float32 of `shape`: the changed matrix."""
        added = self.b.dequantize().T @ self.a.dequantize()
        return np.float32(self.scale) * base + np.float32(self.gain) * added


@dataclass(frozen=True, slots=True)
class Adapter:
    """What makes another model of the one whose `fingerprint` is `base`."""

    base: str
    activation: Activation
    matrices: Mapping[str, Factors]  # by tensor name: every matrix but embedding and head
    vectors: Mapping[str, Tensor]  # F32, by tensor name: norms, and biases where there are any
    name: str  # of the model that it makes
    license: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)  # free, ready for JSON

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        factors = sum(f.a.nbytes + f.b.nbytes for f in self.matrices.values())
        return factors + sum(tensor.nbytes for tensor in self.vectors.values())


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256, in hex, of tensors in the order of their names: for each "NAME TYPE ROWSxCOLUMNS\\n" (ROWS for
    a vector) and its data."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.type} {'x'.join(map(str, tensor.shape))}\n".encode())
        digest.update(tensor.data.data)
    return digest.hexdigest()


def apply(base: Model, adapter: Adapter) -> Model:
    """The model that `adapter` makes of `base`, without predictors; its matrices are F32, merged whenever
    their data is asked for. ValueError if it is of another model."""
    shapes: dict[str, tuple[int, ...]] = {name: factors.shape for name, factors in adapter.matrices.items()}
    shapes |= {name: tensor.shape for name, tensor in adapter.vectors.items()}
    expected = {name: tensor.shape for name, tensor in base.tensors.items() if name not in _TOKENS}
    for name in expected | shapes:
        if shapes.get(name) != expected.get(name):
            ours, theirs = (found.get(name, "none") for found in (shapes, expected))
            raise ValueError(
                f"the adapter {adapter.name} is of another model than {base.name}: tensor {name} has shape "
                f"{ours} there, {theirs} here"
            )
    if (found := fingerprint(base.tensors)) != adapter.base:
        raise ValueError(
            f"the adapter {adapter.name} is of a model with the fingerprint {adapter.base[:16]}, and that of "
            f"{base.name} is {found[:16]}: give the file that it was made from, in the same types"
        )
    tensors = dict(base.tensors) | dict(adapter.vectors)
    for name, factors in adapter.matrices.items():
        tensors[name] = Tensor("F32", factors.shape, partial(_merged, tensors[name], factors))
    return Model(replace(base.config, activation=adapter.activation), tensors, base.tokenizer, adapter.name)


def _merged(base: Tensor, factors: Factors) -> np.ndarray:
    return factors.merged(base.dequantize()).view(np.uint8)


def extract(base: Model, tuned: Model, ranks: int | Mapping[str, int]) -> Adapter:
    """The adapter of these ranks that takes `base` nearest to `tuned`, by squared error; factors are F32.

    `ranks`: one for all, or one for each kind of matrix (`FFN`, `ATTENTION`); a matrix's smaller side is
    enough. Nothing is lost of a `tuned` that was trained with adapters of no greater ranks. Embedding and
    head of `tuned` are left out: see `change`. ValueError if the two differ in more than weights.
    """
    for item in fields(base.config):
        ours, theirs = (getattr(model.config, item.name) for model in (base, tuned))
        if ours != theirs and item.name not in _FREE:
            raise ValueError(
                f"{item.name} is {theirs} in {tuned.name} and {ours} in {base.name}: no adapter leads there"
            )
    kinds = (*FFN, *ATTENTION)
    ranks = ranks if isinstance(ranks, Mapping) else dict.fromkeys(kinds, ranks)
    if sorted(ranks) != sorted(kinds) or min(ranks.values()) < 1:
        raise ValueError(f"ranks of at least 1 are needed for {', '.join(kinds)}, not {dict(ranks)}")
    matrices, vectors = {}, {}
    for name, tensor in tuned.tensors.items():
        if name in _TOKENS:
            continue
        values = tensor.dequantize()
        if not np.isfinite(values).all():
            raise ValueError(f"tensor {name} of {tuned.name}: NaN or infinite values")
        if values.ndim == 1:
            vectors[name] = _float32(values)
        else:
            matrices[name] = _factors(base.tensors[name].dequantize(), values, ranks[kind_of(name)])
    return Adapter(fingerprint(base.tensors), tuned.config.activation, matrices, vectors, tuned.name)


def parse_ranks(text: str) -> dict[str, int]:
    """By kind of matrix, of `R` or `FFN:ATTENTION`."""
    ffn, colon, attention = text.partition(":")
    numbers = [ffn, attention if colon else ffn]
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(
            f"ranks are a number of at least 1, or two, of FFNs and attention, as 80:32, not {text!r}"
        )
    return dict.fromkeys(FFN, int(numbers[0])) | dict.fromkeys(ATTENTION, int(numbers[1]))


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
    """What adapters leave out: the change of embedding and head, relative to their size."""
    names = [name for name in _TOKENS if name in base.tensors]
    pairs = [(base.tensors[name].dequantize(), tuned.tensors[name].dequantize()) for name in names]
    squares = sum(float(np.vdot(b - a, b - a)) for a, b in pairs)
    return math.sqrt(squares / sum(float(np.vdot(a, a)) for a, _ in pairs))


def _factors(base: np.ndarray, tuned: np.ndarray, rank: int) -> Factors:
    """Of two float32 matrices of one shape: the truncated singular value decomposition of tuned - s base."""
    base, tuned = base.astype(np.float64), tuned.astype(np.float64)
    if wide := base.shape[0] < base.shape[1]:
        base, tuned = base.T, tuned.T
    rank = min(rank, base.shape[1])
    scale = _scale(base, tuned, rank)
    difference = tuned - scale * base
    right = _main_directions(difference.T @ difference, rank)
    left = difference @ right
    # a singular value's root on either side; 1 is the greatest number: well within what float16 scales hold
    roots = np.sqrt(np.linalg.norm(left, axis=0))
    roots[roots == 0] = 1
    left, right = left / roots, right * roots
    gains = [float(np.abs(side).max()) or 1.0 for side in (left, right)]
    b, a = (_float32(side.T / gain) for side, gain in zip((left, right), gains, strict=True))
    return Factors(scale, float(np.float32(math.prod(gains))), *((b, a) if wide else (a, b)))


def _scale(base: np.ndarray, tuned: np.ndarray, rank: int) -> float:
    """The s, a float32, for which tuned - s base is nearest to a matrix of this rank.

    In turns: the main directions of the difference, and the best s for what they leave.
    """
    bb, tb, tt = base.T @ base, tuned.T @ base, tuned.T @ tuned
    whole = np.trace(tb), np.trace(bb)
    scale = whole[0] / whole[1] if whole[1] else 1.0
    taken = np.empty(0)
    for turn in range(_ROUNDS if rank < len(bb) and whole[1] else 0):
        gram = tt - scale * (tb + tb.T) + scale * scale * bb
        # they turn little from then on: one step of the power iteration follows them
        taken = np.linalg.qr(gram @ taken)[0] if turn else _main_directions(gram, rank)
        t, b = (w - np.vdot(taken, m @ taken) for w, m in zip(whole, (tb, bb), strict=True))
        before, scale = scale, t / b
        if abs(scale - before) <= _TOLERANCE * abs(before):
            break
    return float(np.float32(scale))


def _main_directions(gram: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal columns [n, rank] of the greatest eigenvalues, in descending order."""
    return np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]


def _float32(values: np.ndarray) -> Tensor:
    return Tensor("F32", values.shape, np.ascontiguousarray(values, np.float32).view(np.uint8))
