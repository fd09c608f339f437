"""Recall, predicted sparsity, and thresholds that reach a recall, over inputs and packed active sets."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prosparse.predictor.collect import unpack

Score = Callable[[Tensor], Tensor]  # float32 [n, d] -> float32 [n, d_ff]
_CHUNK = 1 << 23  # scores that exist at a time


@dataclass(frozen=True, slots=True)
class Counts:
    """What a predictor named, over `elements` = tokens x neurons: `hits` of the `active` are among the
    `candidates`."""

    elements: int
    active: int
    candidates: int
    hits: int

    @property
    def recall(self) -> float:
        """Activation recall as published: the mean number of active neurons that are predicted over the mean
        number of active ones, a ratio of means (the paper, Appendix C); 1 where none is active."""
        return self.hits / self.active if self.active else 1.0

    @property
    def predicted_sparsity(self) -> float:
        """Share of elements predicted inactive (the paper, Appendix C)."""
        return 1 - self.candidates / self.elements

    @property
    def sparsity(self) -> float:
        """Share of elements that are inactive."""
        return 1 - self.active / self.elements


def calibrate(
    score: Score, inputs: np.ndarray, active: np.ndarray, recalls: Sequence[float]
) -> tuple[float, ...]:
    """For each recall the largest float32 threshold at which at least that share of active neurons score it
    or more. `inputs` [n, d], `active` bits [n, ceil(d_ff / 8)].

    Without a single active neuron it lies just above every score. ValueError for scores that are not finite.
    """
    found: list[Tensor] = []
    top = -math.inf
    for scores, mask in _chunks(score, inputs, active):
        found.append(scores[mask])
        top = max(top, float(scores.max()))
    values = torch.cat(found)
    if not len(values):
        above = float(np.nextafter(np.float32(top), np.float32(np.inf)))
        return (above,) * len(recalls)
    # of the smallest k with k / n >= recall, the k-th greatest score
    ordered = values.sort(descending=True).values
    return tuple(float(ordered[_needed(recall, len(ordered)) - 1]) for recall in recalls)


def _needed(recall: float, n: int) -> int:
    """The smallest k from 1 on with k / n >= recall."""
    k = min(n, max(1, math.ceil(recall * n)))
    while k > 1 and (k - 1) / n >= recall:
        k -= 1
    while k < n and k / n < recall:
        k += 1
    return k


def count(score: Score, inputs: np.ndarray, active: np.ndarray, thresholds: Sequence[float]) -> list[Counts]:
    """What is named at each threshold: scores at least as great. Arguments and errors as for `calibrate`."""
    elements = total = 0
    candidates, hits = [0] * len(thresholds), [0] * len(thresholds)
    for scores, mask in _chunks(score, inputs, active):
        elements += scores.numel()
        of_active = scores[mask]
        total += len(of_active)
        for i, threshold in enumerate(thresholds):
            candidates[i] += int((scores >= threshold).sum())
            hits[i] += int((of_active >= threshold).sum())
    return [Counts(elements, total, c, h) for c, h in zip(candidates, hits, strict=True)]


def _chunks(score: Score, inputs: np.ndarray, active: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """(scores [n, d_ff], bool [n, d_ff]) of some tokens at a time."""
    if len(inputs) != len(active) or not len(inputs):
        raise ValueError(
            f"{len(inputs)} inputs and {len(active)} active sets: some, and one of each, are needed"
        )
    step = max(1, _CHUNK // (8 * active.shape[1]))
    with torch.no_grad():
        for start in range(0, len(inputs), step):
            scores = score(torch.from_numpy(inputs[start : start + step].astype(np.float32)))
            if not scores.isfinite().all():
                raise ValueError("the predictor's scores are not finite: train it again with a lower rate")
            mask = unpack(np.ascontiguousarray(active[start : start + step]), scores.shape[1])
            yield scores, torch.from_numpy(mask).to(scores.device)
