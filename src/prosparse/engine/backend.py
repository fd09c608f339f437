"""Choices made once, when a model is loaded: which engine, context length, threads and mode, and why."""

import mmap
import os
from typing import Any

import numpy as np

from prosparse.model.config import ModelConfig
from prosparse.model.model import Model, Tensor

_DEFAULT_CTX = 4096


def core_config(config: ModelConfig) -> dict[str, Any]:
    """The flat dict that `_core.Model` and `NaiveModel` are made from."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "qk_norm",
    )
    return {name: getattr(config, name) for name in names} | {
        "hidden_act": config.activation.name,
        "hidden_act_param": config.activation.param,
        "inv_freq": config.inv_freq().tolist(),
        "rope_attention_factor": config.rope_attention_factor(),
    }


def backend_classes(name: str) -> tuple[Any, Any]:
    """(Model, Cache) classes."""
    if name == "cpu":
        from prosparse import _core

        return _core.Model, _core.Cache
    if name == "naive":
        from prosparse.engine.naive import NaiveCache, NaiveModel

        return NaiveModel, NaiveCache
    raise ValueError(f"backend must be cpu or naive, not {name!r}")


def choose_ctx(config: ModelConfig, n_ctx: int | None) -> int:
    """As asked, or 4096, or less where the model was made for less; ValueError if more was asked."""
    # inside its window, sliding attention is full attention, the only kind there is here
    limit = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    if n_ctx is None:
        return min(_DEFAULT_CTX, limit)
    if n_ctx < 1:
        raise ValueError(f"n_ctx must be at least 1, not {n_ctx}")
    if n_ctx > limit:
        kind = "sliding window" if limit == config.sliding_window else "longest context"
        raise ValueError(f"n_ctx is {n_ctx}, but the model's {kind} is {limit} tokens")
    return n_ctx


def choose_mode(model: Model, mode: str, recall: float | None) -> tuple[str, str]:
    """The mode, exact, dense or predicted, and the reason for it.

    auto keeps results exact unless a `recall` is asked for; then it says predicted, for the caller to measure
    whether that is faster.
    """
    activation = model.config.activation
    zeros = "has exact zeros to skip" if activation.sparse else "has no exact zeros to skip"
    if mode not in ("auto", "exact", "dense", "predicted"):
        raise ValueError(f"mode must be auto, exact, dense or predicted, not {mode!r}")
    if recall is not None and mode in ("exact", "dense"):
        raise ValueError(f"a recall is for predicted mode; {mode} mode finds all active neurons")
    if mode in ("exact", "predicted") and not activation.sparse:
        raise ValueError(f"mode {mode} needs a sparse activation, but {activation.name} {zeros}: use dense")
    if (mode == "predicted" or recall is not None) and model.predictors is None:
        raise ValueError(f"{model.name} has no predictors: make them with `prosparse predict`")
    if mode == "auto" and recall is not None:
        return "predicted", f"recall {recall:g} was asked for"
    if mode == "auto":
        return "exact" if activation.sparse else "dense", f"{activation.name} {zeros}"
    return mode, "as asked"


def set_predictors(core: Any, model: Model, recall: float) -> None:
    """Hands a model's predictors to the engine, calibrated to `recall`."""
    from prosparse.formats.quants import quantize, to_native

    predictors = model.predictors
    assert predictors is not None
    thresholds = predictors.at(recall).tolist()
    for i in range(model.config.num_hidden_layers):
        parts: dict[str, Tensor] = {}
        if predictors.kind == "lowrank":
            parts = dict(zip(("fc1", "fc2"), predictors.networks[i], strict=True))
        elif predictors.kind == "sketch":
            gate = model.tensors[f"model.layers.{i}.mlp.gate_proj.weight"]
            data = quantize(gate.dequantize(), predictors.sketch)
            parts = {"sketch": Tensor(predictors.sketch, gate.shape, data)}
        for part, tensor in parts.items():
            native = to_native(tensor)
            data = native.data
            name = f"model.layers.{i}.predictor.{part}.weight"
            core.set_tensor(name, native.type, native.shape, data, is_file_view(data))
    core.set_predictor(predictors.kind, predictors.input == "residual", thresholds)


def choose_threads(n_threads: int | None) -> int:
    """As asked, or one per core this process may use."""
    if n_threads is None:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if n_threads < 1:
        raise ValueError(f"threads must be at least 1, not {n_threads}")
    return n_threads


def is_file_view(data: np.ndarray) -> bool:
    """Whether the bytes are a mapped file's: the engine then drops their pages once it has copied them."""
    base: object = data
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap)
