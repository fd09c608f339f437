"""Changes of a matrix as codes: each weight moves by -1, 0 or 1 steps of its row, in 1 or 1.6 bits.

Two levels are those of BitDelta (Liu et al. 2024, arXiv 2402.10193), three those of Ternary Weight Networks
(Li et al. 2016, arXiv 1605.04711).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prosparse.model.model import Tensor

LEVELS = {2: 8, 3: 5}  # levels -> codes in a byte: 2^8 = 256, 3^5 = 243
_POWERS = 3 ** np.arange(5)
_DIGITS = (np.arange(3**5)[:, None] // _POWERS % 3).astype(np.int8)
_ROUNDS, _TOLERANCE = 20, 1e-6  # of the search for a scale; the share of the error worth another round
_LARGEST = 65504.0  # of float16
_SAMPLE = 128  # rows in which it begins
_ROUNDING = 2.0**-21  # of a row's greatest weight: smaller steps are what float32 leaves of no change


@dataclass(frozen=True, slots=True)
class Coded:
    """The change of one matrix [rows, columns]: scale (W + step code), with one step for each row."""

    scale: float  # of the matrix itself
    levels: int  # 2: codes are -1 and 1; 3: also 0
    columns: int
    steps: Tensor  # F16 [rows]
    codes: Tensor  # I8 [rows, bytes of a row], as of `packed`

    def __post_init__(self) -> None:
        if self.levels not in LEVELS:
            raise ValueError(f"{self.levels} levels are not known: 2 and 3 are")
        width = -(-self.columns // LEVELS[self.levels])
        if self.codes.type != "I8" or self.columns < 1 or self.codes.shape[1:] != (width,):
            raise ValueError(
                f"codes must be I8 [rows, {width}] for {self.columns} columns of {self.levels} levels, not "
                f"{self.codes.type} {self.codes.shape}"
            )
        if (self.steps.type, self.steps.shape) != ("F16", self.codes.shape[:1]):
            raise ValueError(
                f"steps must be F16 {self.codes.shape[:1]}, one for each row, not "
                f"{self.steps.type} {self.steps.shape}"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"a scale must be finite and above 0, not {self.scale}")
        steps = self.steps.dequantize()
        if not (np.isfinite(steps).all() and (steps >= 0).all()):
            raise ValueError("a step is NaN, infinite or below 0")
        if self.levels == 3 and (largest := self.codes.data.max()) >= len(_DIGITS):
            raise ValueError(f"a byte {largest} of codes of 3 levels: {len(_DIGITS) - 1} is the greatest")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.codes.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.steps.nbytes + self.codes.nbytes

    def merged(self, base: np.ndarray) -> np.ndarray:
        """float32 of `shape`: the changed matrix."""
        result = unpacked(self.codes.data, self.levels, self.columns).astype(np.float32)
        result *= self.steps.dequantize()[:, None]
        result += base
        result *= np.float32(self.scale)
        return result


def packed(codes: np.ndarray, levels: int) -> np.ndarray:
    """uint8 [rows, bytes]: codes [rows, columns] as digits (0, 1 of 2 levels; 0, 1, 2 of 3 for -1, 0, 1), the
    first the lowest; a row's last byte ends with zeros."""
    if levels == 2:
        return np.packbits(codes > 0, axis=1, bitorder="little")
    digits = np.pad((codes + 1).astype(np.uint8), ((0, 0), (0, -codes.shape[1] % 5)))
    # Horner, the last digit first: without a product of integer matrices, which numpy is slow at
    result = digits[:, 4::5].copy()
    for i in (3, 2, 1, 0):
        result *= 3
        result += digits[:, i::5]
    return result


def unpacked(data: np.ndarray, levels: int, columns: int) -> np.ndarray:
    """The int8 codes [rows, columns] of what `packed` returns."""
    if levels == 2:
        return np.unpackbits(data, axis=1, count=columns, bitorder="little").view(np.int8) * 2 - 1
    return _DIGITS[data].reshape(len(data), -1)[:, :columns] - 1


def coded(base: np.ndarray, tuned: np.ndarray, levels: int) -> Coded:
    """The coded change that takes `base` near to `tuned`, float32 matrices of one shape, by squared error.

    Exactly to it, up to rounding of the scale, if it was made so and nothing ties codes to weights. Else the
    error is least for the scale, but for the rounding of steps, and nearly so over all scales. ValueError if
    nothing of `base` is left in `tuned`.
    """
    sample = slice(None, None, max(1, len(base) // _SAMPLE))
    few = base[sample], tuned[sample]
    start = min((_nearest(*few, levels, scale) for scale in _candidates(*few)), key=lambda found: found.error)
    found = _nearest(base, tuned, levels, start.scale)
    codes = packed(found.codes, levels)
    tensor = Tensor("I8", codes.shape, codes)
    # without a quotient yet, which may overflow
    if not (found.scale > 0 and (found.steps <= _LARGEST * found.scale).all()):
        raise ValueError("nothing of the base is left in it, and codes only add to one: is this its base?")
    halves = (found.steps / found.scale).astype(np.float16)
    steps = Tensor("F16", halves.shape, halves.view(np.uint8))
    return Coded(float(found.scale), levels, base.shape[1], steps, tensor)


@dataclass(frozen=True, slots=True)
class _Found:
    error: float  # squared
    scale: np.float32
    steps: np.ndarray
    codes: np.ndarray  # float32, -1, 0 and 1


def _candidates(base: np.ndarray, tuned: np.ndarray) -> Iterator[np.float32]:
    """Scales to begin with: that of no folding, the best without a change, the most frequent quotient."""
    yield np.float32(1)
    if not (square := float(np.vdot(base, base))):
        return
    yield np.float32(np.vdot(base, tuned) / square)
    usable = np.abs(base) > 1e-6 * np.abs(base).max()
    quotients = np.sort(tuned[usable] / base[usable])
    # the narrowest interval that holds a tenth of them: where codes are 0, quotients are the scale
    reach = len(quotients) // 10
    widths = quotients[reach:] - quotients[: len(quotients) - reach]
    yield quotients[np.argmin(widths) + reach // 2]


def _nearest(base: np.ndarray, tuned: np.ndarray, levels: int, scale: np.float32) -> _Found:
    """In turns: the best codes and steps for the scale, and the best scale (with steps) for these codes."""
    square = float(np.vdot(base, base))
    least_steps = np.float32(_ROUNDING) * np.abs(tuned).max(axis=1)
    for turn in range(_ROUNDS):
        difference = tuned - scale * base
        codes, steps = _coded_rows(difference, levels)
        unchanged = steps <= least_steps
        steps[unchanged], codes[unchanged] = 0, 0 if levels == 3 else 1
        difference -= steps[:, None] * codes
        # of the base, what lies across the codes of each row: steps take up the rest
        along = (base * codes).sum(axis=1) / np.sqrt(np.maximum(np.count_nonzero(codes, axis=1), 1))
        across = square - float(np.vdot(along, along))
        # the remainder lies across already, and what of the scale is wrong shrinks with it
        correction = float(np.vdot(difference, base)) / across if across > 1e-6 * square else 0.0
        error = float(np.vdot(difference, difference))
        better = np.float32(scale + correction)
        if turn == _ROUNDS - 1 or better == scale or correction**2 * across <= _TOLERANCE * error:
            break
        scale = better
    return _Found(error, scale, steps, codes)


def _coded_rows(difference: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (float32) and steps of the least squared error for each row."""
    sizes = np.abs(difference)
    if levels == 2:
        return np.where(difference < 0, np.float32(-1), np.float32(1)), sizes.mean(axis=1)
    # k codes with a step s take k s^2 off a row's square: most if these are its k largest, and s their mean
    ordered = np.sort(sizes, axis=1)[:, ::-1]
    taken_off = ordered.cumsum(axis=1)
    taken_off *= taken_off
    taken_off /= np.arange(1, sizes.shape[1] + 1, dtype=np.float32)
    least = np.take_along_axis(ordered, taken_off.argmax(axis=1)[:, None], axis=1)
    taken = sizes >= least
    steps = (sizes * taken).sum(axis=1) / np.count_nonzero(taken, axis=1).astype(np.float32)
    return np.sign(difference) * taken, steps
