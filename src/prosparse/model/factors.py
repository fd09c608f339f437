"""Changes of a matrix as low-rank factors, and the nearest of a rank to the difference of two matrices."""

import math
from dataclasses import dataclass

import numpy as np

from prosparse.model.model import Tensor, float32

_ROUNDS, _TOLERANCE = 20, 1e-5  # of the search for a scale


@dataclass(frozen=True, slots=True)
class Factors:
    """The change of one matrix [rows, columns]."""

    scale: float  # of the matrix itself
    gain: float  # of the product of the factors
    a: Tensor  # [rank, columns]
    b: Tensor  # [rank, rows]

    def __post_init__(self) -> None:
        if len(self.a.shape) != 2 or len(self.b.shape) != 2 or self.a.shape[0] != self.b.shape[0]:
            raise ValueError(f"factors of shapes {self.a.shape} and {self.b.shape} are not of one rank")
        if not (math.isfinite(self.scale) and math.isfinite(self.gain)):
            raise ValueError(f"NaN or infinite scales {self.scale}, {self.gain}")

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.b.shape[1], self.a.shape[1]

    def merged(self, base: np.ndarray) -> np.ndarray:
        """float32 of `shape`: the changed matrix."""
        added = self.b.dequantize().T @ self.a.dequantize()
        return np.float32(self.scale) * base + np.float32(self.gain) * added


def factored(base: np.ndarray, tuned: np.ndarray, rank: int) -> Factors:
    """Of two float32 matrices of one shape: the truncated singular value decomposition of tuned - s base."""
    base, tuned = base.astype(np.float64), tuned.astype(np.float64)
    if wide := base.shape[0] < base.shape[1]:
        base, tuned = base.T, tuned.T
    rank = min(rank, base.shape[1])
    scale = _scale(base, tuned, rank)
    difference = tuned - scale * base
    right = _main_directions(difference.T @ difference, rank)
    left = difference @ right
    # a singular value's root on either side; 1 is the greatest number: well within what float16 scales hold
    roots = np.sqrt(np.linalg.norm(left, axis=0))
    roots[roots == 0] = 1
    left, right = left / roots, right * roots
    gains = [float(np.abs(side).max()) or 1.0 for side in (left, right)]
    b, a = (float32(side.T / gain) for side, gain in zip((left, right), gains, strict=True))
    return Factors(scale, float(np.float32(math.prod(gains))), *((b, a) if wide else (a, b)))


def _scale(base: np.ndarray, tuned: np.ndarray, rank: int) -> float:
    """The s, a float32, for which tuned - s base is nearest to a matrix of this rank.

    In turns: the main directions of the difference, and the best s for what they leave.
    """
    bb, tb, tt = base.T @ base, tuned.T @ base, tuned.T @ tuned
    whole = np.trace(tb), np.trace(bb)
    scale = whole[0] / whole[1] if whole[1] else 1.0
    taken = np.empty(0)
    for turn in range(_ROUNDS if rank < len(bb) and whole[1] else 0):
        gram = tt - scale * (tb + tb.T) + scale * scale * bb
        # they turn little from then on: one step of the power iteration follows them
        taken = np.linalg.qr(gram @ taken)[0] if turn else _main_directions(gram, rank)
        t, b = (w - np.vdot(taken, m @ taken) for w, m in zip(whole, (tb, bb), strict=True))
        before, scale = scale, t / b
        if abs(scale - before) <= _TOLERANCE * abs(before):
            break
    return float(np.float32(scale))


def _main_directions(gram: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal columns [n, rank] of the greatest eigenvalues, in descending order."""
    return np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]
