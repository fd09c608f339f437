"""Adapters: what training has added to a model, as low-rank factors or codes of a bit or two.

Each matrix W of a layer becomes `scale W + gain B^T A` (`Factors`) or `scale (W + steps code)` (`Coded`).
Folded thresholds and weight decay multiply whole matrices, which neither can hold: hence the scale. Vectors
are kept whole; embedding and head stay as they are.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np

from prosparse.model.activation import Activation
from prosparse.model.coded import LEVELS, Coded, coded
from prosparse.model.factors import Factors, factored
from prosparse.model.model import Model, Tensor, float32

FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_KINDS = (*FFN, *ATTENTION)
ROUNDING = 0.01  # a `change` that is no news: F16, BF16 and Q8_0 stay below
_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")
# what a model may have otherwise than its base: the activation is the adapter's, the others stay the base's
_FREE = ("activation", "bos_token_id", "eos_token_ids", "max_position_embeddings")

Change = Factors | Coded


@dataclass(frozen=True, slots=True)
class Adapter:
    """What makes another model of the one whose `fingerprint` is `base`."""

    base: str
    activation: Activation
    matrices: Mapping[str, Change]  # by tensor name: every matrix but embedding and head
    vectors: Mapping[str, Tensor]  # F32, by tensor name: norms, and biases where there are any
    name: str  # of the model that it makes
    license: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)  # free, ready for JSON

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in (*self.matrices.values(), *self.vectors.values()))


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
    shapes: dict[str, tuple[int, ...]] = {name: part.shape for name, part in adapter.matrices.items()}
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
    for name, part in adapter.matrices.items():
        tensors[name] = Tensor("F32", part.shape, partial(_merged, name, tensors[name], part))
    return Model(replace(base.config, activation=adapter.activation), tensors, base.tokenizer, adapter.name)


def _merged(name: str, base: Tensor, part: Change) -> np.ndarray:
    try:
        return part.merged(base.dequantize()).view(np.uint8)
    except ValueError as error:
        raise ValueError(f"tensor {name} of the adapter: {error}") from None


def extract(
    base: Model,
    tuned: Model,
    ranks: int | Mapping[str, int] | None = None,
    levels: int | Mapping[str, int] | None = None,
) -> Adapter:
    """The adapter of these ranks and levels that takes `base` nearest to `tuned`, by squared error; factors
    are F32.

    `ranks` are of factors, `levels` (2, 3 or 5) of codes: one for all, or by kind of matrix (`FFN`,
    `ATTENTION`); each kind is in one of the two. A matrix's smaller side is rank enough. Nothing is lost of a
    `tuned` that was trained in this form, with no greater ranks. Embedding and head of `tuned` are left out:
    see `change`. ValueError if the two differ in more than weights.
    """
    check_related(base, tuned)
    ranks, levels = _by_kind(ranks), _by_kind(levels)
    if sorted([*ranks, *levels]) != sorted(_KINDS) or min(ranks.values(), default=1) < 1:
        raise ValueError(
            f"ranks of at least 1 are needed for {', '.join(_KINDS)}, or levels, not {ranks} and {levels}"
        )
    if unknown := set(levels.values()) - set(LEVELS):
        raise ValueError(f"{unknown.pop()} levels are not known: 2, 3 and 5 are")
    matrices: dict[str, Change] = {}
    vectors: dict[str, Tensor] = {}
    for name, tensor in tuned.tensors.items():
        if name in _TOKENS:
            continue
        values = tensor.dequantize()
        if not np.isfinite(values).all():
            raise ValueError(f"tensor {name} of {tuned.name}: NaN or infinite values")
        if values.ndim == 1:
            vectors[name] = float32(values)
            continue
        original, kind = base.tensors[name].dequantize(), kind_of(name)
        if kind in levels:
            try:
                matrices[name] = coded(original, values, levels[kind])
            except ValueError as error:
                raise ValueError(f"tensor {name} of {tuned.name}: {error}") from None
        else:
            matrices[name] = factored(original, values, ranks[kind])
    return Adapter(fingerprint(base.tensors), tuned.config.activation, matrices, vectors, tuned.name)


def check_related(base: Model, tuned: Model) -> None:
    """ValueError if the two differ in more than weights."""
    for item in fields(base.config):
        ours, theirs = (getattr(model.config, item.name) for model in (base, tuned))
        if ours != theirs and item.name not in _FREE:
            raise ValueError(
                f"{item.name} is {theirs} in {tuned.name} and {ours} in {base.name}: no adapter leads there"
            )


def _by_kind(given: int | Mapping[str, int] | None) -> dict[str, int]:
    return dict.fromkeys(_KINDS, given) if isinstance(given, int) else dict(given or {})


def parse_ranks(text: str) -> dict[str, int]:
    """By kind of matrix, of `R` or `FFN:ATTENTION`."""
    ffn, attention = _pair(text)
    if not all(number.isdecimal() and int(number) for number in (ffn, attention)):
        raise ValueError(
            f"ranks are a number of at least 1, or two, of FFNs and attention, as 80:32, not {text!r}"
        )
    return dict.fromkeys(FFN, int(ffn)) | dict.fromkeys(ATTENTION, int(attention))


def parse_levels(text: str) -> dict[str, int]:
    """By kind of matrix, of `L` or `FFN:ATTENTION` and exceptions, as `3,gate_proj=2`.

    Kinds with 0, which are to have no codes, are left out.
    """
    first, *exceptions = text.split(",")
    ffn, attention = _pair(first)
    levels = dict.fromkeys(FFN, ffn) | dict.fromkeys(ATTENTION, attention)
    for exception in exceptions:
        kind, _, number = exception.partition("=")
        if kind not in levels:
            raise ValueError(f"levels of {kind!r}: the kinds of matrices are {', '.join(levels)}")
        levels[kind] = number
    if not set(levels.values()) <= {"0", *map(str, LEVELS)}:
        raise ValueError(
            "levels are 2, 3 or 5, or 0 for no codes, or two, of FFNs and attention, as 3:2, and exceptions, "
            f"as 3,gate_proj=2, not {text!r}"
        )
    return {kind: int(number) for kind, number in levels.items() if number != "0"}


def _pair(text: str) -> tuple[str, str]:
    """Of FFNs and of attention."""
    ffn, colon, attention = text.partition(":")
    return ffn, attention if colon else ffn


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `up_proj`."""
    return name.split(".")[-2]


def kept(base: Model, tuned: Model, adapter: Adapter) -> dict[str, float]:
    """By kind of matrix: the share of the squared difference, less what scales explain, that is kept."""
    sums = {kind: np.zeros(2) for kind in (*ATTENTION, *FFN)}
    for name, part in adapter.matrices.items():
        theirs, ours = tuned.tensors[name].dequantize(), base.tensors[name].dequantize()
        rest, whole = theirs - part.merged(ours), theirs - np.float32(part.scale) * ours
        sums[kind_of(name)] += np.vdot(rest, rest), np.vdot(whole, whole)
    return {kind: float(1 - rest / whole) if whole else 1.0 for kind, (rest, whole) in sums.items()}


def change(base: Model, tuned: Model, names: Collection[str] = _TOKENS) -> float:
    """Of these tensors, relative to their size; of embedding and head, which adapters leave out."""
    names = [name for name in names if name in base.tensors]
    if not names:
        return 0.0
    pairs = [(base.tensors[name].dequantize(), tuned.tensors[name].dequantize()) for name in names]
    squares = sum(float(np.vdot(b - a, b - a)) for a, b in pairs)
    return math.sqrt(squares / sum(float(np.vdot(a, a)) for a, _ in pairs))
