"""Choosing the next token, in the order of llama.cpp: penalties, top-k, top-p, min-p, temperature."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Candidates = tuple[NDArray[np.integer], NDArray[np.floating]]  # token ids, and a value for each


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the next token. The defaults are llama.cpp's."""

    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int = 40  # 0 is off
    top_p: float = 0.95  # 1 is off
    min_p: float = 0.05  # share of the likeliest token's probability; 0 is off
    repeat_penalty: float = 1.0  # 1 is off
    repeat_last_n: int = 64  # tokens of history the penalty looks at; -1 is all of it
    seed: int | None = None  # None draws differently every time

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, wanted: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

        check("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive number")
        check("top_k", self.top_k >= 0, "0 (off) or a positive whole number")
        check("top_p", 0 <= self.top_p <= 1, "between 0 and 1 (off)")
        check("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1")
        check("repeat_penalty", 0 < self.repeat_penalty < math.inf, "a positive number (1 is off)")
        check("repeat_last_n", self.repeat_last_n >= -1, "-1 (all), 0 (off) or a positive whole number")
        check("seed", self.seed is None or self.seed >= 0, "None or a whole number from 0")


class Sampler:
    """Draws tokens with its own random generator: the same seed gives the same tokens."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """The next token's id. `logits` [vocab] are left as they are; `history` is all ids so far."""
        ids, probabilities = self.candidates(logits, history)
        if len(ids) == 1:
            return int(ids[0])
        cumulative = probabilities.cumsum()
        drawn = cumulative.searchsorted(self._random.random() * cumulative[-1], side="right")
        # the product may round up to the sum itself: that is the last token of any probability
        return int(ids[min(drawn, cumulative.searchsorted(cumulative[-1]))])

    def candidates(self, logits: NDArray[np.float32], history: Sequence[int] = ()) -> Candidates:
        """The ids that may be drawn, with their probabilities.

        Likeliest first (lower id on ties), except that all tokens come in the order of their ids.
        """
        p = self.params
        logits = self._penalize(np.asarray(logits, dtype=np.float32), history)
        peak = logits.max()
        if not math.isfinite(peak):
            raise ValueError("the logits hold NaN or infinity: the model's weights or activation are broken")
        if p.temperature == 0:
            return np.array([logits.argmax()]), np.ones(1)
        if p.top_k == 0 and p.top_p == 1 and p.min_p == 0:
            kept: Candidates = np.arange(logits.size), logits - peak
        else:
            kept = self._likeliest(logits, peak)
        ids, values = kept
        weights = np.exp(values.astype(np.float64) / p.temperature)
        return ids, weights / weights.sum()

    def _likeliest(self, logits: NDArray[np.float32], peak: np.float32) -> Candidates:
        """What top-k, top-p and min-p leave, with logits relative to `peak`."""
        p = self.params
        total = None if p.top_k or p.top_p == 1 else float(np.exp(logits - peak).sum(dtype=np.float64))
        limit = p.top_k or 256  # without top-k, sort only as many as the others turn out to keep
        while True:
            limit = min(limit, logits.size)
            ids, values = _top_k()(logits, limit)
            values = values - peak
            keep = limit
            if p.top_p < 1:
                cumulative = np.exp(values, dtype=np.float64).cumsum()
                bound = p.top_p * (cumulative[-1] if total is None else total)
                keep = min(keep, int(cumulative.searchsorted(bound)) + 1)
            if p.min_p > 0:
                # values fall: the first below the bound ends the candidates
                keep = min(keep, int((-values).searchsorted(-math.log(p.min_p), side="right")))
            if p.top_k or keep < limit or limit == logits.size:
                return ids[:keep], values[:keep]
            limit *= 16

    def _penalize(self, logits: NDArray[np.float32], history: Sequence[int]) -> NDArray[np.float32]:
        p = self.params
        if p.repeat_penalty == 1 or p.repeat_last_n == 0 or not len(history):
            return logits
        recent = history if p.repeat_last_n < 0 else history[-p.repeat_last_n :]
        seen = np.unique(np.asarray(recent, dtype=np.int64))
        values = logits[seen]
        penalty = np.float32(p.repeat_penalty)
        logits = logits.copy()
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        return logits


def sort_top_k(logits: NDArray[np.float32], k: int) -> Candidates:
    """The k largest logits, largest first, lower ids first on ties: the twin of the native `top_k`."""
    if k < logits.size:
        bound = np.partition(logits, logits.size - k)[logits.size - k]
        above, ties = np.flatnonzero(logits > bound), np.flatnonzero(logits == bound)
        ids = np.concatenate([above, ties[: k - len(above)]])
    else:
        ids = np.arange(logits.size)
    values = logits[ids]
    order = np.argsort(-values, kind="stable")  # ids rise within `above` and within `ties`
    return ids[order], values[order]


@cache
def _top_k() -> Callable[[NDArray[np.float32], int], Candidates]:
    try:
        from prosparse._core import top_k
    except ImportError:
        return sort_top_k
    return top_k
