"""Rewrite a model as an equal one that more programs can hold.

MiniCPM's scales go into plain LLaMA weights; per-layer FATReLU thresholds become one threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from prosparse.model.activation import Activation
from prosparse.model.model import Model, Tensor

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def fold_scales(model: Model) -> Model:
    """A llama model that computes the same as a minicpm one; others are returned as they are.

    Scaled matrices become F32. The embedding and the head get different factors, so a tied model is untied.
    The residual stream holds the same numbers as before, and so predictors are kept as they are.
    """
    config = model.config
    if config.architecture != "minicpm":
        return model
    tensors = dict(model.tensors)
    head = tensors[_EMBEDDING if config.tie_word_embeddings else _HEAD]
    tensors[_HEAD] = scaled(head, 1 / config.logit_scale)
    tensors[_EMBEDDING] = scaled(tensors[_EMBEDDING], config.embedding_scale)
    for i in range(config.num_hidden_layers):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{i}.{part}.weight"
            tensors[name] = scaled(tensors[name], config.residual_scale)
    folded = replace(
        config,
        architecture="llama",
        tie_word_embeddings=False,
        embedding_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
    )
    return Model(folded, tensors, model.tokenizer, model.name, model.predictors)


def unfold_scales(
    model: Model, embedding_scale: float, residual_scale: float, logit_scale: float, *, tied: bool
) -> Model:
    """The inverse of `fold_scales`: the minicpm model, `tied` or not, that a llama one was made of."""
    tensors = dict(model.tensors)
    tensors[_EMBEDDING] = scaled(tensors[_EMBEDDING], 1 / embedding_scale)
    head = tensors.pop(_HEAD)
    if not tied:
        tensors[_HEAD] = scaled(head, logit_scale)
    for i in range(model.config.num_hidden_layers):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{i}.{part}.weight"
            tensors[name] = scaled(tensors[name], 1 / residual_scale)
    config = replace(
        model.config,
        architecture="minicpm",
        tie_word_embeddings=tied,
        embedding_scale=embedding_scale,
        residual_scale=residual_scale,
        logit_scale=logit_scale,
    )
    return Model(config, tensors, model.tokenizer, model.name, model.predictors)


def fold_thresholds(model: Model, thresholds: Sequence[float], threshold: float) -> Model:
    """Give every layer the FATReLU threshold `threshold` in place of its own of `thresholds`.

    fatrelu_t(g) u = fatrelu_ct(c g) u/c for c > 0: with c = threshold / own, gate rows are multiplied and
    up rows divided by c. All thresholds must be positive. Of the predictors only a sketch, a copy of the
    gate, gives scores that grow by c, and its thresholds with them.
    """
    config = model.config
    if len(thresholds) != config.num_hidden_layers:
        raise ValueError(f"{len(thresholds)} thresholds for {config.num_hidden_layers} layers")
    for value in (*thresholds, threshold):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"thresholds must be positive to be folded, not {value}")
    tensors = dict(model.tensors)
    for name, factor in fold_factors(thresholds, threshold).items():
        tensors[name] = scaled(tensors[name], factor)
    config = replace(config, activation=Activation("fatrelu", float(threshold)))
    predictors = model.predictors
    if predictors and predictors.kind == "sketch":
        rows = zip(predictors.thresholds, thresholds, strict=True)
        scaled_rows = tuple(tuple(value * threshold / own for value in row) for row, own in rows)
        predictors = replace(predictors, thresholds=scaled_rows)
    return Model(config, tensors, model.tokenizer, model.name, predictors)


def fold_factors(thresholds: Sequence[float], threshold: float) -> dict[str, float]:
    """By tensor name, what gates and ups are multiplied by to have `threshold` in place of their own."""
    factors = {}
    for i, own in enumerate(thresholds):
        factors[f"model.layers.{i}.mlp.gate_proj.weight"] = threshold / own
        factors[f"model.layers.{i}.mlp.up_proj.weight"] = own / threshold
    return factors


def unfold_thresholds(model: Model, original: Model) -> tuple[Model, list[float]]:
    """The inverse of `fold_thresholds` for a model that `original` became by training: the same model, with
    gates and ups scaled to be nearest to the original's gates, and the threshold of each layer."""
    tensors, thresholds = dict(model.tensors), []
    for i, factor in enumerate(folding(model, original)):
        gate, up = (f"model.layers.{i}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        tensors[gate], tensors[up] = scaled(tensors[gate], 1 / factor), scaled(tensors[up], factor)
        thresholds.append(model.config.activation.param / factor)
    return replace(model, tensors=tensors), thresholds


def folding(model: Model, original: Model) -> list[float]:
    """By layer, what the gates of `original` are multiplied by to be nearest to those of `model`, which it
    became by training. ValueError where nothing is left of them."""
    factors = []
    for i in range(model.config.num_hidden_layers):
        gate = f"model.layers.{i}.mlp.gate_proj.weight"
        ours, theirs = (m.tensors[gate].dequantize().astype(np.float64).ravel() for m in (model, original))
        factor = float(ours @ theirs / (theirs @ theirs))
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{gate} has nothing left of the original's: it was not made from that model")
        factors.append(factor)
    return factors


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """F32 tensor times `factor`, computed when its data is asked for; the tensor itself for 1."""
    if factor == 1:
        return tensor
    return Tensor("F32", tensor.shape, partial(_product, tensor, factor))


def _product(tensor: Tensor, factor: float) -> np.ndarray:
    return (tensor.dequantize() * np.float32(factor)).view(np.uint8)
