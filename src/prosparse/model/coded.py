"""Changes of a matrix as codes: each weight moves by a few steps of its row and column.

Codes are entropy-coded: where most are 0 they take little. Those of two levels are those of BitDelta (Liu et
al. 2024, arXiv 2402.10193), of three those of Ternary Weight Networks (Li et al. 2016, arXiv 1605.04711), and
five go on as these do.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prosparse.model.model import Tensor

LEVELS = (2, 3, 5)  # codes are -1 and 1; also 0; also -2 and 2
_ROUNDS, _TOLERANCE = 20, 1e-6  # of the search for a scale; the share of the error worth another round
_LARGEST = 65504.0  # of float16
_SAMPLE = 128  # rows in which it begins
_ROUNDING = 2.0**-21  # of a row's greatest weight: smaller steps are what float32 leaves of no change


@dataclass(frozen=True, slots=True)
class Coded:
    """The change of one matrix [rows, columns]: scale (W + step column_step code), where steps are of rows,
    and columns have none of their own if `column_steps` is None."""

    scale: float  # of the matrix itself
    columns: int
    steps: Tensor  # F16 [rows]
    column_steps: Tensor | None  # F16 [columns]
    stream: Tensor  # I8 [bytes], as of `encoded`

    def __post_init__(self) -> None:
        if self.stream.type != "I8" or len(self.stream.shape) != 1 or self.columns < 1:
            raise ValueError(
                f"codes must be I8 [bytes], of columns, not {self.stream.type} {self.stream.shape} of "
                f"{self.columns} columns"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"a scale must be finite and above 0, not {self.scale}")
        for of, steps in (("row", self.steps), ("column", self.column_steps)):
            if steps is None:
                continue
            shape = steps.shape if of == "row" else (self.columns,)
            if steps.type != "F16" or len(steps.shape) != 1 or steps.shape != shape:
                raise ValueError(
                    f"steps must be F16, one for each {of}, not {steps.type} {steps.shape} for "
                    f"{self.columns} columns"
                )
            values = steps.dequantize()
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError("a step is NaN, infinite or below 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.steps.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.steps.nbytes + self.stream.nbytes + (self.column_steps.nbytes if self.column_steps else 0)

    def codes(self) -> np.ndarray:
        """int16 of `shape`. ValueError if the bytes are not those of codes of this shape."""
        from prosparse import _core  # at use: what only looks at a file needs no native module

        return _core.decode_codes(self.stream.data, *self.shape)

    def merged(self, base: np.ndarray) -> np.ndarray:
        """float32 of `shape`: the changed matrix."""
        result = self.codes().astype(np.float32)
        result *= self.steps.dequantize()[:, None]
        if self.column_steps:
            result *= self.column_steps.dequantize()
        result += base
        result *= np.float32(self.scale)
        return result


def encoded(codes: np.ndarray) -> Tensor:
    """I8 [bytes] of codes [rows, columns], whole numbers of up to 32767 in size."""
    from prosparse import _core

    data = _core.encode_codes(np.ascontiguousarray(codes, np.int16))
    return Tensor("I8", data.shape, data)


def float16(values: np.ndarray) -> Tensor:
    halves = np.asarray(values).astype(np.float16)
    return Tensor("F16", halves.shape, halves.view(np.uint8))


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
    # without a quotient yet, which may overflow
    if not (found.scale > 0 and (found.steps <= _LARGEST * found.scale).all()):
        raise ValueError("nothing of the base is left in it, and codes only add to one: is this its base?")
    steps = float16(found.steps / found.scale)
    return Coded(float(found.scale), base.shape[1], steps, None, encoded(found.codes))


@dataclass(frozen=True, slots=True)
class _Found:
    error: float  # squared
    scale: np.float32
    steps: np.ndarray
    codes: np.ndarray  # float32


def _candidates(base: np.ndarray, tuned: np.ndarray) -> Iterator[np.float32]:
    """Scales to begin with: the best without a change, the most frequent quotient, that of no folding.

    The first comes before others that do as well: where nothing is left of the base, it is 0.
    """
    if square := float(np.vdot(base, base)):
        yield np.float32(np.vdot(base, tuned) / square)
        usable = np.abs(base) > 1e-6 * np.abs(base).max()
        quotients = np.sort(tuned[usable] / base[usable])
        # the narrowest interval that holds a tenth of them: where codes are 0, quotients are the scale
        reach = len(quotients) // 10
        widths = quotients[reach:] - quotients[: len(quotients) - reach]
        yield quotients[np.argmin(widths) + reach // 2]
    yield np.float32(1)


def _nearest(base: np.ndarray, tuned: np.ndarray, levels: int, scale: np.float32) -> _Found:
    """In turns: the best codes and steps for the scale, and the best scale (with steps) for these codes."""
    square = float(np.vdot(base, base))
    least_steps = np.float32(_ROUNDING) * np.abs(tuned).max(axis=1)
    for turn in range(_ROUNDS):
        difference = tuned - scale * base
        codes, steps = _coded_rows(difference, levels)
        unchanged = steps <= least_steps
        steps[unchanged], codes[unchanged] = 0, 1 if levels == 2 else 0
        difference -= steps[:, None] * codes
        # of the base, what lies across the codes of each row: steps take up the rest
        along = (base * codes).sum(axis=1) / np.sqrt(np.maximum((codes * codes).sum(axis=1), 1))
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
    # As a step falls, the code of a size becomes k where the step is size / (k - 1/2). That adds the size to
    # <size, code> and 2 k - 1 to <code, code>, whose quotient is the best step of these codes: it takes
    # <size, code>^2 / <code, code> off the row's square. All codes that a step can make are tried so.
    halves = np.arange(1, levels, 2, dtype=np.float32)  # 2 k - 1
    ordered = np.sort(sizes, axis=1)[:, ::-1]
    turns = np.concatenate([ordered / half for half in halves], axis=1)
    order = np.argsort(-turns, axis=1, kind="stable")  # which merges runs in order
    taken_off = np.take_along_axis(np.tile(ordered, len(halves)), order, axis=1).cumsum(axis=1)
    taken_off *= taken_off
    taken_off /= np.repeat(halves, sizes.shape[1])[order].cumsum(axis=1)
    best = np.take_along_axis(order, taken_off.argmax(axis=1)[:, None], axis=1)
    least = np.take_along_axis(turns, best, axis=1)
    codes = sum(((sizes / half >= least).astype(np.float32) for half in halves), np.zeros_like(sizes))
    steps = (sizes * codes).sum(axis=1) / (codes * codes).sum(axis=1)
    return np.sign(difference) * codes, steps
