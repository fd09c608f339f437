"""The forward pass in plain float32 numpy: slow, short, and what every faster engine is tested against.

Same two classes and methods as the native module `prosparse._core`. Shape suffixes: T tokens, S positions
in the cache, D hidden, F neurons, H heads, G key-value heads, K head dimension, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prosparse.model.activation import Activation
from prosparse.model.model import Tensor


class NaiveModel:
    """`config` is the flat dict that `backend.core_config` makes; `mode` is "exact" or "dense"."""

    def __init__(self, config: Mapping[str, Any], n_threads: int = 1, mode: str = "exact") -> None:
        if mode not in ("exact", "dense"):
            raise ValueError(f"mode must be exact or dense, not {mode!r}")
        self.config = dict(config)
        self.n_threads = n_threads
        self.mode = mode
        self.skipping = mode == "exact"  # the native engine gives it up where it does not pay
        self._activation = Activation(config["hidden_act"], config["hidden_act_param"])
        if mode == "exact" and not self._activation.sparse:
            raise ValueError(f"exact mode needs an activation with exact zeros, not {self._activation.name}")
        self._inv_freq = np.asarray(config["inv_freq"], np.float32)
        self._weights: dict[str, np.ndarray] = {}
        self._nbytes: dict[str, int] = {}
        self.reset_stats()

    def set_tensor(
        self, name: str, type: str, shape: Sequence[int], data: np.ndarray, mapped: bool = False
    ) -> None:
        """Takes one weight by its Hugging Face name, as stored."""
        self._weights[name] = Tensor(type, tuple(shape), data).dequantize()
        self._nbytes[name] = data.nbytes

    def finish(self) -> None:
        """Call after the last `set_tensor`."""
        head = "lm_head.weight" if "lm_head.weight" in self._weights else "model.embed_tokens.weight"
        self._head_VD = self._weights[head]
        embedding_row = self._nbytes["model.embed_tokens.weight"] // self.config["vocab_size"]
        always = [n for n in self._nbytes if n.startswith("model.layers.") and not _is_skipped(n)]
        self._always_bytes = (
            sum(self._nbytes[n] for n in (*always, "model.norm.weight", head)) + embedding_row
        )
        self._skipped_bytes = sum(n for name, n in self._nbytes.items() if _is_skipped(name))

    def forward(
        self, cache: "NaiveCache", tokens: Sequence[int] | np.ndarray, all_logits: bool = False
    ) -> np.ndarray:
        """float32 logits [T or 1, V]; appends T positions to `cache`."""
        c = self.config
        ids = np.asarray(tokens, np.int32)
        if ids.ndim != 1 or not ids.size:
            raise ValueError("tokens must be a list of at least one id")
        if ids.min() < 0 or ids.max() >= c["vocab_size"]:
            raise ValueError(f"token ids must be from 0 to {c['vocab_size'] - 1}")
        if cache.n_past + ids.size > cache.n_ctx:
            raise ValueError(f"{ids.size} tokens after {cache.n_past} do not fit a context of {cache.n_ctx}")
        positions = np.arange(cache.n_past, cache.n_past + ids.size, dtype=np.float32)
        angles = positions[:, None] * self._inv_freq
        scale = np.float32(c["rope_attention_factor"])
        rope_TK = np.cos(angles) * scale, np.sin(angles) * scale

        h_TD: np.ndarray = self._weights["model.embed_tokens.weight"][ids] * np.float32(c["embedding_scale"])
        residual = np.float32(c["residual_scale"])
        for layer in range(c["num_hidden_layers"]):
            x_TD = self._norm(h_TD, f"model.layers.{layer}.input_layernorm")
            h_TD = h_TD + residual * self._attention(layer, x_TD, rope_TK, cache)
            x_TD = self._norm(h_TD, f"model.layers.{layer}.post_attention_layernorm")
            h_TD = h_TD + residual * self._ffn(layer, x_TD)
        cache.n_past += ids.size

        self._stats[_kind(ids.size) + "tokens"] += ids.size
        if not all_logits:
            h_TD = h_TD[-1:]
        return self._norm(h_TD, "model.norm") @ self._head_VD.T / np.float32(c["logit_scale"])

    def stats(self) -> dict[str, int]:
        """Since `reset_stats`, of decoding: `tokens`; how many of `neurons` (over tokens and layers) were
        `active`; `weight_bytes_read`. The same of prefill under `prefill_...`, as if token by token."""
        stats = dict(self._stats)
        for kind in ("", "prefill_"):
            density = (
                stats[kind + "active"] / max(stats[kind + "neurons"], 1) if self.mode == "exact" else 1.0
            )
            per_token = self._always_bytes + density * self._skipped_bytes
            stats[kind + "weight_bytes_read"] = round(stats[kind + "tokens"] * per_token)
        return stats

    def reset_stats(self) -> None:
        self._stats = {f"{kind}{n}": 0 for kind in ("", "prefill_") for n in ("tokens", "active", "neurons")}

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """RMS norm over the last axis."""
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return (
            x
            / np.sqrt(mean_square + np.float32(self.config["rms_norm_eps"]))
            * self._weights[f"{name}.weight"]
        )

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self._weights[f"{name}.weight"].T
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _attention(
        self, layer: int, x_TD: np.ndarray, rope_TK: tuple[np.ndarray, np.ndarray], cache: "NaiveCache"
    ) -> np.ndarray:
        c, t = self.config, len(x_TD)
        name = f"model.layers.{layer}.self_attn"
        q_THK = self._linear(x_TD, f"{name}.q_proj").reshape(t, c["num_attention_heads"], -1)
        k_TGK = self._linear(x_TD, f"{name}.k_proj").reshape(t, c["num_key_value_heads"], -1)
        v_TGK = self._linear(x_TD, f"{name}.v_proj").reshape(t, c["num_key_value_heads"], -1)
        if c["qk_norm"]:
            q_THK, k_TGK = self._norm(q_THK, f"{name}.q_norm"), self._norm(k_TGK, f"{name}.k_norm")
        past = cache.n_past
        cache.keys[layer, past : past + t] = _rotate(k_TGK, *rope_TK)
        cache.values[layer, past : past + t] = v_TGK
        k_SGK, v_SGK = cache.keys[layer, : past + t], cache.values[layer, : past + t]

        heads_per_group = c["num_attention_heads"] // c["num_key_value_heads"]
        q_TGRK = _rotate(q_THK, *rope_TK).reshape(t, c["num_key_value_heads"], heads_per_group, -1)
        scores_GRTS = np.einsum("tgrk,sgk->grts", q_TGRK, k_SGK) / np.sqrt(np.float32(c["head_dim"]))
        later = np.arange(past + t) > past + np.arange(t)[:, None]
        scores_GRTS[..., later] = -np.inf
        weights_GRTS = np.exp(scores_GRTS - scores_GRTS.max(-1, keepdims=True))
        weights_GRTS /= weights_GRTS.sum(-1, keepdims=True)
        return self._linear(np.einsum("grts,sgk->tgrk", weights_GRTS, v_SGK).reshape(t, -1), f"{name}.o_proj")

    def _ffn(self, layer: int, x_TD: np.ndarray) -> np.ndarray:
        name = f"model.layers.{layer}.mlp"
        gate_TF = self._activation(self._linear(x_TD, f"{name}.gate_proj"))
        self._stats[_kind(len(x_TD)) + "active"] += int(np.count_nonzero(gate_TF))
        self._stats[_kind(len(x_TD)) + "neurons"] += gate_TF.size
        if self.mode == "dense":
            return self._linear(gate_TF * self._linear(x_TD, f"{name}.up_proj"), f"{name}.down_proj")
        up_FD, down_DF = self._weights[f"{name}.up_proj.weight"], self._weights[f"{name}.down_proj.weight"]
        y_TD = np.empty_like(x_TD)
        for x_D, gate_F, y_D in zip(x_TD, gate_TF, y_TD, strict=True):
            active = np.flatnonzero(gate_F)
            y_D[:] = down_DF[:, active] @ (gate_F[active] * (up_FD[active] @ x_D))
        return y_TD


class NaiveCache:
    """Keys (rotated) and values of up to `n_ctx` positions; `n_past` of them are filled."""

    def __init__(self, model: NaiveModel, n_ctx: int) -> None:
        c = model.config
        shape = (c["num_hidden_layers"], n_ctx, c["num_key_value_heads"], c["head_dim"])
        self.keys = np.zeros(shape, np.float32)
        self.values = np.zeros(shape, np.float32)
        self.n_ctx = n_ctx
        self.n_past = 0

    def truncate(self, n: int) -> None:
        """Forgets all positions from `n` on."""
        if not 0 <= n <= self.n_past:
            raise ValueError(f"cannot truncate a cache of {self.n_past} positions to {n}")
        self.n_past = n


def _rotate(x_THK: np.ndarray, cos_TK: np.ndarray, sin_TK: np.ndarray) -> np.ndarray:
    """Rotary positions; dimension i turns with i + K/2 (Hugging Face's layout)."""
    a, b = np.split(x_THK, 2, axis=-1)
    cos, sin = cos_TK[:, None], sin_TK[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _is_skipped(name: str) -> bool:
    """Whether exact mode reads only the active neurons' share of this weight."""
    return name.endswith((".up_proj.weight", ".down_proj.weight"))


def _kind(n_tokens: int) -> str:
    return "" if n_tokens == 1 else "prefill_"
