"""Choices made once, when a model is loaded: which engine, context length, threads and mode, and why."""

import mmap
import os
from typing import Any

import numpy as np

from prosparse.model.config import ModelConfig

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


def choose_mode(config: ModelConfig, mode: str) -> tuple[str, str]:
    """The mode, exact or dense, and the reason for it."""
    activation = config.activation
    zeros = "has exact zeros to skip" if activation.sparse else "has no exact zeros to skip"
    if mode == "auto":
        return "exact" if activation.sparse else "dense", f"{activation.name} {zeros}"
    if mode not in ("exact", "dense"):
        raise ValueError(f"mode must be auto, exact or dense, not {mode!r}")
    if mode == "exact" and not activation.sparse:
        raise ValueError(f"mode exact needs a sparse activation, but {activation.name} {zeros}: use dense")
    return mode, "as asked"


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
