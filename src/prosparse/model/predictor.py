"""Activation predictors: what names, before the gate is computed, the neurons that may be active.

A neuron is a candidate where its score is at least its layer's threshold. Three ways to a score:

lowrank: fc2 relu(fc1 x), a small trained network (Deja Vu; the ProSparse paper, Appendix C)
sketch:  a low-bit copy of the gate times x; the threshold lies below the activation's by a margin
sign:    how many of x's signs agree with the gate row's, less how many do not (SparseInfer, 2411.12692)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prosparse.model.config import ModelConfig
from prosparse.model.model import Tensor

Kind = Literal["lowrank", "sketch", "sign"]
Input = Literal["residual", "normed"]
KINDS = ("lowrank", "sketch", "sign")
INPUTS = ("residual", "normed")


@dataclass(frozen=True, slots=True)
class Predictors:
    """The predictors of a model.

    `input` is what they see: the residual stream before the FFN's norm (as published, and in PowerInfer) or
    what the gate sees. `networks` of kind lowrank: (fc1 [rank, d], fc2 [d_ff, rank]) by layer, else empty.
    `recalls` ascend; `thresholds[layer][i]` is calibrated to `recalls[i]`, so thresholds fall with i.
    `default` is the recall that is used if none is asked for. `sketch` is the type of that copy.
    """

    kind: Kind
    input: Input
    recalls: tuple[float, ...]
    thresholds: tuple[tuple[float, ...], ...]
    default: float
    networks: tuple[tuple[Tensor, Tensor], ...] = ()
    sketch: str = "Q4_0"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown predictor {self.kind!r}: known are {', '.join(KINDS)}")
        if self.input not in INPUTS:
            raise ValueError(f"a predictor's input is {' or '.join(INPUTS)}, not {self.input!r}")
        if self.kind != "lowrank" and (self.input != "normed" or self.networks):
            raise ValueError(f"a {self.kind} predictor has no networks and sees what the gate sees")
        if not self.recalls or not all(0 < r <= 1 for r in self.recalls):
            raise ValueError("recalls must be shares above 0")
        if list(self.recalls) != sorted(set(self.recalls)):
            raise ValueError("recalls must ascend")
        if not self.recalls[0] <= self.default <= self.recalls[-1]:
            raise ValueError(f"the default recall {self.default} is outside of the calibrated {self.recalls}")
        for layer, values in enumerate(self.thresholds):
            if len(values) != len(self.recalls):
                raise ValueError(
                    f"layer {layer} has {len(values)} thresholds for {len(self.recalls)} recalls"
                )
            if not all(map(math.isfinite, values)) or list(values) != sorted(values, reverse=True):
                raise ValueError(f"thresholds of layer {layer} must be finite and fall as recall rises")
        if self.kind == "lowrank" and len(self.networks) != len(self.thresholds):
            raise ValueError(f"{len(self.networks)} networks for {len(self.thresholds)} layers")

    def check(self, config: ModelConfig) -> None:
        """ValueError unless they are for such a model."""
        if len(self.thresholds) != config.num_hidden_layers:
            raise ValueError(
                f"predictors for {len(self.thresholds)} layers, the model has {config.num_hidden_layers}"
            )
        if not config.activation.sparse:
            raise ValueError(f"{config.activation.name} has no inactive neurons to predict")
        for layer, (fc1, fc2) in enumerate(self.networks):
            rank = fc1.shape[0]
            wanted = (rank, config.hidden_size), (config.intermediate_size, rank)
            if (fc1.shape, fc2.shape) != wanted:
                raise ValueError(
                    f"the predictor of layer {layer} is {fc1.shape} and {fc2.shape}, not {wanted[0]} and "
                    f"{wanted[1]}"
                )

    def at(self, recall: float | None = None) -> np.ndarray:
        """float32 [layers]: thresholds for a recall, in between linear. ValueError outside the calibrated."""
        recall = self.default if recall is None else recall
        if not self.recalls[0] <= recall <= self.recalls[-1]:
            raise ValueError(
                f"recall {recall} was not calibrated: {self.recalls[0]} to {self.recalls[-1]} is possible"
            )
        found = [np.interp(recall, self.recalls, values) for values in self.thresholds]
        return np.array(found, np.float32)


def scores(kind: Kind, x: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [n, d_ff] of inputs `x` [n, d]: the plain twin of every implementation.

    `weights`: (fc1, fc2), (the sketch,) or (the gate,), float32.
    """
    match kind, tuple(weights):
        case "lowrank", (fc1, fc2):
            return np.maximum(x @ fc1.T, np.float32(0)) @ fc2.T
        case "sketch", (sketch,):
            return x @ sketch.T
        case "sign", (gate,):
            # a zero counts as positive on both sides
            return np.where(x < 0, np.float32(-1), 1) @ np.where(gate < 0, np.float32(-1), 1).T
    raise ValueError(f"{len(weights)} weights do not make a {kind} predictor")
