"""The forward pass in plain float32 numpy: slow, short, and what every faster engine is tested against.

Same two classes and methods as the native module `prosparse._core`. Shape suffixes: T tokens, S positions
in the cache, D hidden, F neurons, H heads, G key-value heads, K head dimension, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prosparse.model.activation import Activation
from prosparse.model.model import Tensor
from prosparse.model.predictor import Kind, scores


class NaiveModel:
    """`config` is the flat dict that `backend.core_config` makes; `mode`: exact, dense or predicted."""

    def __init__(self, config: Mapping[str, Any], n_threads: int = 1, mode: str = "exact") -> None:
        if mode not in ("exact", "dense", "predicted"):
            raise ValueError(f"mode must be exact, dense or predicted, not {mode!r}")
        self.config = dict(config)
        self.n_threads = n_threads
        self.mode = mode
        self.skipping = mode != "dense"  # the native engine gives it up where it does not pay
        self.predicting = mode == "predicted"
        self._predictor: tuple[Kind, bool, np.ndarray] | None = None
        self._activation = Activation(config["hidden_act"], config["hidden_act_param"])
        if mode != "dense" and not self._activation.sparse:
            raise ValueError(f"{mode} mode needs an activation with exact zeros, not {self._activation.name}")
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

    def set_predictor(self, kind: Kind, residual: bool, thresholds: Sequence[float]) -> None:
        """Thresholds [layers]; weights are the tensors `model.layers.N.predictor...`. See `Predictors`."""
        if self.mode != "predicted":
            raise ValueError("only predicted mode takes a predictor")
        self._predictor = kind, residual, np.asarray(thresholds, np.float32)

    def finish(self) -> None:
        """Call after the last `set_tensor`."""
        if self.mode == "predicted" and self._predictor is None:
            raise ValueError("predicted mode needs a predictor")
        head = "lm_head.weight" if "lm_head.weight" in self._weights else "model.embed_tokens.weight"
        self._head_VD = self._weights[head]
        embedding_row = self._nbytes["model.embed_tokens.weight"] // self.config["vocab_size"]
        layers = [n for n in self._nbytes if n.startswith("model.layers.") and ".predictor." not in n]
        always = [n for n in layers if not _is_skipped(n)]
        self._always_bytes = (
            sum(self._nbytes[n] for n in (*always, "model.norm.weight", head)) + embedding_row
        )
        self._skipped_bytes = sum(n for name, n in self._nbytes.items() if _is_skipped(name))
        self._gate_bytes = sum(n for name, n in self._nbytes.items() if ".gate_proj." in name)
        self._predictor_bytes = sum(n for name, n in self._nbytes.items() if ".predictor." in name)
        if self._predictor is not None and self._predictor[0] == "sign":
            neurons = self.config["num_hidden_layers"] * self.config["intermediate_size"]
            self._predictor_bytes = neurons * -(-self.config["hidden_size"] // 64) * 8

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
            # a prompt has its gates computed all the same: the union of many tokens' neurons is most of them
            if self.predicting and len(x_TD) == 1:
                h_TD = h_TD + residual * self._predicted_ffn(layer, h_TD, x_TD)
            else:
                h_TD = h_TD + residual * self._ffn(layer, x_TD)
        cache.n_past += ids.size

        self._stats[_kind(ids.size) + "tokens"] += ids.size
        if not all_logits:
            h_TD = h_TD[-1:]
        return self._norm(h_TD, "model.norm") @ self._head_VD.T / np.float32(c["logit_scale"])

    def stats(self) -> dict[str, int]:
        """Since `reset_stats`, of decoding: `tokens`; how many of `neurons` (over tokens and layers) were
        `active`; `weight_bytes_read`. The same of prefill under `prefill_...`, as if token by token. In
        predicted mode also how many neurons were `candidates`."""
        stats = dict(self._stats)
        for kind in ("", "prefill_"):
            neurons = max(stats[kind + "neurons"], 1)
            density = stats[kind + "active"] / neurons if self.mode != "dense" else 1.0
            per_token = self._always_bytes + density * self._skipped_bytes
            if self.predicting and not kind:
                unread = 1 - stats["candidates"] / neurons
                per_token += self._predictor_bytes - unread * self._gate_bytes
            stats[kind + "weight_bytes_read"] = round(stats[kind + "tokens"] * per_token)
        return stats

    def reset_stats(self) -> None:
        names = [f"{kind}{n}" for kind in ("", "prefill_") for n in ("tokens", "active", "neurons")]
        self._stats = dict.fromkeys([*names, "candidates"], 0)

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

    def _predicted_ffn(self, layer: int, h_TD: np.ndarray, x_TD: np.ndarray) -> np.ndarray:
        """Of one token: gates of the candidates only, then up and down of those that are active."""
        assert self._predictor is not None, "finish has seen to it"
        kind, residual, thresholds = self._predictor
        name = f"model.layers.{layer}"
        parts = {"lowrank": ("predictor.fc1", "predictor.fc2"), "sketch": ("predictor.sketch",)}
        weights = [self._weights[f"{name}.{part}.weight"] for part in parts.get(kind, ("mlp.gate_proj",))]
        score_F = scores(kind, h_TD if residual else x_TD, weights)[0]
        # a score that is NaN names its neuron
        candidates = np.flatnonzero(~(score_F < thresholds[layer]))
        gate_FD, up_FD, down_DF = (
            self._weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        gate = self._activation(gate_FD[candidates] @ x_TD[0])
        active, gate = candidates[gate != 0], gate[gate != 0]
        self._stats["candidates"] += candidates.size
        self._stats["active"] += active.size
        self._stats["neurons"] += len(gate_FD)
        return (down_DF[:, active] @ (gate * (up_FD[active] @ x_TD[0])))[None]


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
