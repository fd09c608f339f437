"""Predictors as they are stored and run: quantised weights, their scores in torch, their bytes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prosparse.formats.quants import quantize
from prosparse.model.model import BLOCKS, Model
from prosparse.model.model import Tensor as StoredTensor
from prosparse.model.predictor import Kind, Predictors
from prosparse.predictor.metrics import Score

GATE = "model.layers.{}.mlp.gate_proj.weight"
_WORD = 64  # bits in which the engine keeps signs


def stored(values: np.ndarray, kind: str) -> StoredTensor:
    """A float32 matrix as a tensor of a native type. ValueError for columns that do not fill its blocks."""
    if values.shape[-1] % BLOCKS[kind][0]:
        raise ValueError(
            f"rows of {values.shape[-1]} do not fill the blocks of {BLOCKS[kind][0]} of {kind}: choose "
            "another --rank, or --type f16"
        )
    return StoredTensor(kind, values.shape, quantize(values, kind))


def weights_of(predictors: Predictors, model: Model, layer: int) -> tuple[np.ndarray, ...]:
    """float32, what `model.predictor.scores` takes: as the engine has them, quantised and read again."""
    if predictors.kind == "lowrank":
        fc1, fc2 = predictors.networks[layer]
        return fc1.dequantize(), fc2.dequantize()
    gate = model.tensors[GATE.format(layer)].dequantize()
    if predictors.kind == "sketch":
        return (stored(gate, predictors.sketch).dequantize(),)
    return (gate,)


def scorer(kind: Kind, weights: Sequence[np.ndarray], device: torch.device | str = "cpu") -> Score:
    """`model.predictor.scores` in torch: float32 [n, d] -> float32 [n, d_ff] on `device`."""
    match kind, tuple(torch.from_numpy(w).to(device) for w in weights):
        case "lowrank", (fc1, fc2):
            return lambda x: (x.to(device) @ fc1.T).relu_() @ fc2.T
        case "sketch", (sketch,):
            return lambda x: x.to(device) @ sketch.T
        case "sign", (gate,):
            signs = _signs(gate)
            return lambda x: _signs(x.to(device)) @ signs.T
    raise ValueError(f"{len(weights)} weights do not make a {kind} predictor")


def _signs(x: Tensor) -> Tensor:
    # a zero counts as positive
    return torch.where(x < 0, -1.0, 1.0)


def predictor_bytes(predictors: Predictors, model: Model) -> list[int]:
    """Bytes of each layer's predictor that every token reads."""
    config = model.config
    layers = range(config.num_hidden_layers)
    if predictors.kind == "lowrank":
        return [fc1.nbytes + fc2.nbytes for fc1, fc2 in predictors.networks]
    if predictors.kind == "sign":
        words = -(-config.hidden_size // _WORD)
        return [config.intermediate_size * words * _WORD // 8 for _ in layers]
    block, size = BLOCKS[predictors.sketch]
    return [config.intermediate_size * config.hidden_size // block * size for _ in layers]


def rank_bytes(model: Model, kind: str) -> float:
    """Bytes that one more rank adds to a layer's network of type `kind`."""
    block, size = BLOCKS[kind]
    return (model.config.hidden_size + model.config.intermediate_size) * size / block


def gate_bytes(model: Model) -> list[int]:
    """Bytes of each layer's gate matrix, as stored."""
    return [model.tensors[GATE.format(layer)].nbytes for layer in range(model.config.num_hidden_layers)]
