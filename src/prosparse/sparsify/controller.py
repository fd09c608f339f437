"""Target control: per-layer FATReLU thresholds that steer training to a wanted sparsity.

L1 alone shrinks x1 but leaves much of it above zero. Here each layer has a threshold; its density (share of
active neurons) is compared with a target every step, and the threshold follows the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prosparse.sparsify.schedule import rise


@dataclass(frozen=True, slots=True)
class TargetControl:
    """Sparsity rises from what ReLU gives to `target` along a sine between two shares of training."""

    target: float  # overall share of zeros
    start: float = 0.08  # share of training before which thresholds stay 0
    end: float = 0.75  # share of training after which the target stands
    gain: float = 0.5  # change of a threshold per unit of density error and step
    falls: bool = False  # thresholds are there from the start, so that sparsity can also fall to `target`

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"the target sparsity must be between 0 and 1, not {self.target}")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start {self.start} and end {self.end} must rise within 0 and 1")
        if not self.gain > 0:
            raise ValueError(f"the gain must be positive, not {self.gain}")

    def wanted(self, natural: float, progress: float) -> float:
        """Overall sparsity wanted at a share `progress` of training; `natural` is what was there before."""
        share = min(1.0, max(0.0, (progress - self.start) / (self.end - self.start)))
        target = self.target if self.falls else max(self.target, natural)
        return natural + rise(share) * (target - natural)


def layer_densities(natural: Sequence[float], overall: float, falls: bool = False) -> np.ndarray:
    """Target density of each layer, float64: proportional to its `natural` one, with mean `overall`.

    No layer is asked for more than its natural density, unless thresholds made it (`falls`).
    """
    densities = np.asarray(natural, np.float64)
    if densities.ndim != 1 or not densities.size or not ((densities >= 0) & (densities <= 1)).all():
        raise ValueError("natural densities must be a list of shares between 0 and 1")
    if not 0 <= overall <= 1:
        raise ValueError(f"the overall density must be between 0 and 1, not {overall}")
    mean = densities.mean()
    if mean <= overall and not (falls and mean):
        return densities.copy()  # thresholds start at 0, where a layer is as dense as it can be
    return np.minimum(1.0, densities * (overall / mean))


def step(thresholds: np.ndarray, densities: np.ndarray, wanted: np.ndarray, gain: float) -> np.ndarray:
    """The thresholds after one step: up where a layer is denser than wanted, never below 0."""
    if not np.isfinite(densities).all():
        raise ValueError("a layer's density is not a number: its activations are broken")
    return np.maximum(0.0, thresholds + gain * (densities - wanted))
