"""A ReLU model of a real shape with random weights, sparse and with predictors that are right about it.

Speed depends on shapes and shares alone. `predicted.py` has one with FATReLU, which PowerInfer lacks.
"""

import statistics
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks import shapes
from benchmarks.predicted import stored
from prosparse.formats import open_model
from prosparse.model.activation import Activation
from prosparse.model.model import Model, Tensor
from prosparse.model.predictor import Predictors

RANK = 63  # of the gates; the predictors' is twice that, and two units
# The first channel of the stream, times the others' deviation: large and the same for every token, so that
# a weight on it is a bias. Networks and gates have none, and ReLU would leave half of the neurons active.
CHANNEL = 16.0
WRITES = 0.05  # of attention and FFN to the stream, which so stays of one size through all layers
STEP = 1009  # a token is followed by the one so many further: each of a text is another


def relu_model(shape: shapes.Shape, sparsity: float, predicted: float) -> Model:
    """Random ReLU model: `sparsity` of all neurons are inactive, `predicted` of all are named so by
    predictors that miss no active one.

    Random gates cannot be predicted, so these are A B - b e0 of rank 63, and the predictor is the
    factorisation, [A, -A, -b'] relu([B; -B; e0] h), with b' < b by which it names more.
    """
    base = open_model(shapes.cached(shape, "q8_0"))
    deviation = shapes.WEIGHT_STD * (shape.hidden - 1) ** 0.5

    def bias(share: float) -> float:
        return deviation * statistics.NormalDist().inv_cdf(share) / CHANNEL

    def factors(layer: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(layer)
        a = rng.standard_normal((shape.ffn, RANK), np.float32)
        b = rng.standard_normal((RANK, shape.hidden), np.float32) * np.float32(shapes.WEIGHT_STD / RANK**0.5)
        b[:, 0] = 0
        return a, b

    def embedding(source: Tensor) -> np.ndarray:
        values = source.dequantize() / np.float32(shapes.WEIGHT_STD)
        values[:, 0] = CHANNEL
        return stored(values, "F16").data

    def gate(layer: int) -> np.ndarray:
        a, b = factors(layer)
        values = a @ b
        values[:, 0] = -bias(sparsity)
        return stored(values, "F16").data

    def write(source: Tensor) -> np.ndarray:
        values = source.dequantize() * np.float32(WRITES)
        values[0] = 0
        return stored(values, "F16").data

    def network(layer: int) -> tuple[Tensor, Tensor]:
        a, b = factors(layer)
        first = np.eye(2, shape.hidden, dtype=np.float32)
        first[1] = 0
        last = np.tile(np.array([-bias(predicted), 0], np.float32), (shape.ffn, 1))
        return stored(np.vstack([b, -b, first]), "F16"), stored(np.hstack([a, -a, last]), "F16")

    def head(source: Tensor) -> np.ndarray:
        return np.roll(source.data, STEP, axis=0)

    tensors = dict(base.tensors)
    # the stream is nearly its token's embedding: a tied head would repeat the token for ever
    tied = base.tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = Tensor(tied.type, tied.shape, partial(head, tied))
    for name, tensor in base.tensors.items():
        if name == "model.embed_tokens.weight":
            made = partial(embedding, tensor)
        elif name.endswith("gate_proj.weight"):
            made = partial(gate, int(name.split(".")[2]))
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            made = partial(write, tensor)
        else:
            continue
        tensors[name] = Tensor("F16", tensor.shape, made)
    networks = tuple(network(layer) for layer in range(shape.layers))
    predictors = Predictors("lowrank", "residual", (1.0,), ((0.0,),) * shape.layers, 1.0, networks)
    config = replace(base.config, activation=Activation.parse("relu", None), tie_word_embeddings=False)
    return replace(base, config=config, tensors=tensors, predictors=predictors)
