"""Coded changes: packing and merging against naive twins, and what is found of a change."""

from itertools import product

import numpy as np
import pytest

from prosparse.model.coded import LEVELS, Coded, coded, packed, unpacked
from prosparse.model.model import Tensor, float32

SHAPES = [(1, 1), (1, 7), (3, 5), (2, 8), (5, 33), (64, 96)]


def random_codes(shape, levels, rng, zeros=0.3):
    codes = np.where(rng.random(shape) < 0.5, -1, 1)
    if levels == 5:
        codes *= rng.integers(1, 3, shape)
    return codes if levels == 2 else codes * (rng.random(shape) >= zeros)


def made(base, levels, scale, steps, codes):
    """A change of this form, as float32 arithmetic gives it."""
    return np.float32(scale) * (base + steps[:, None] * codes.astype(np.float32))


def normal(rng, shape, deviation=0.1):
    return (deviation * rng.standard_normal(shape)).astype(np.float32)


def some_steps(rng, rows, size=0.02):
    """float32, but float16 numbers, as steps are."""
    return (size * np.exp(0.5 * rng.standard_normal(rows))).astype(np.float16).astype(np.float32)


def float16(values):
    values = np.array(values, np.float16)
    return Tensor("F16", values.shape, values.view(np.uint8))


def packed_naively(row, levels):
    """Bytes of a row of codes, digit by digit."""
    count = LEVELS[levels]
    digits = [(code + 1) // 2 if levels == 2 else code + levels // 2 for code in map(int, row)]
    groups = [digits[i : i + count] for i in range(0, len(digits), count)]
    return [sum(digit * levels**i for i, digit in enumerate(group)) for group in groups]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_packing_against_the_naive_twin(shape, levels):
    codes = random_codes(shape, levels, np.random.default_rng(0))
    data = packed(codes, levels)
    assert data.dtype == np.uint8 and data.tolist() == [packed_naively(row, levels) for row in codes]
    assert np.array_equal(unpacked(data, levels, shape[1]), codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", LEVELS)
def test_merging_against_the_naive_twin(shape, levels):
    rng = np.random.default_rng(1)
    base, steps, codes = normal(rng, shape), some_steps(rng, shape[0]), random_codes(shape, levels, rng)
    data = packed(codes, levels)
    change = Coded(0.7, levels, shape[1], float16(steps), Tensor("I8", data.shape, data))
    assert change.shape == shape and change.nbytes == 2 * shape[0] + data.size
    merged, scale = change.merged(base), np.float32(0.7)
    assert merged.dtype == np.float32
    for row in range(shape[0]):
        for column in range(shape[1]):
            code = np.float32(codes[row, column])
            assert merged[row, column] == scale * (base[row, column] + steps[row] * code)


@pytest.mark.parametrize("scale", [1, 0.7, 1.9])
@pytest.mark.parametrize("size", [0.03, 0.0005])
@pytest.mark.parametrize("levels", LEVELS)
def test_a_change_of_this_form_is_found_exactly(levels, scale, size):
    rng = np.random.default_rng(2)
    for shape in ((150, 67), (300, 64)):
        base, steps = normal(rng, shape), some_steps(rng, shape[0], size)
        base[rng.random(shape) < 0.05] = 0  # as quantised weights are
        codes = random_codes(shape, levels, rng)
        steps[3] = 0
        codes[3] = levels == 2
        tuned = made(base, levels, scale, steps, codes)
        found = coded(base, tuned, levels)
        assert found.scale == pytest.approx(scale, rel=2e-7)
        assert np.array_equal(unpacked(found.codes.data, levels, shape[1]), codes)
        assert np.array_equal(found.steps.data, float16(steps).data)
        assert np.abs(found.merged(base) - tuned).max() < 1e-6 * np.abs(tuned).max()


LIMITS = {2: (-1,), 3: (0.3,), 5: (0.3, 0.9)}  # of a size, above which its code is 1 and 2


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_that_go_with_the_weights(levels):
    # as weight decay and training have it: the quotient of both matrices is not centred on the scale
    rng = np.random.default_rng(3)
    base, steps = normal(rng, (160, 96)), some_steps(rng, 160)
    latent = rng.standard_normal(base.shape) - 5 * base
    sizes = sum((np.abs(latent) > limit).astype(int) for limit in LIMITS[levels])
    codes = np.where(latent < 0, -1, 1) * sizes
    found = coded(base, made(base, levels, 1.3, steps, codes), levels)
    assert found.scale == pytest.approx(1.3, rel=2e-7)
    assert np.array_equal(unpacked(found.codes.data, levels, 96), codes)
    assert np.array_equal(found.steps.data, float16(steps).data)


@pytest.mark.parametrize(("levels", "loss"), [(2, 0.37), (3, 0.2), (5, 0.085)])
@pytest.mark.parametrize("size", [0.01, 0.1])
def test_of_any_change_the_best_is_kept(levels, loss, size):
    rng = np.random.default_rng(4)
    base, change = normal(rng, (200, 301)), normal(rng, (200, 301), size)
    tuned = np.float32(0.8) * base + change
    found = coded(base, tuned, levels)
    # 1 - 2 / pi, 0.190 and 0.082 are the least for a normal distribution
    assert np.sum((tuned - found.merged(base)) ** 2) < loss * np.sum(change**2)
    assert found.scale == pytest.approx(0.8, abs=0.05 * size / 0.1)


@pytest.mark.parametrize("levels", [3, 5])
def test_codes_are_the_best_of_all(levels):
    rng = np.random.default_rng(5)
    change = normal(rng, (8, 6)) ** 3
    found = coded(np.zeros_like(change), change, levels).merged(np.zeros_like(change))
    codes = np.array(list(product(range(levels // 2 + 1), repeat=6))[1:])
    for row, result in zip(change, found, strict=True):
        least = np.sum(row**2) - np.max((codes @ np.abs(row)) ** 2 / np.sum(codes**2, axis=1))
        assert np.sum((row - result) ** 2) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("levels", LEVELS)
def test_matrices_without_a_scale(levels):
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert coded(zeros, zeros, levels).merged(zeros).tolist() == zeros.tolist()
    assert coded(zeros, -ones, levels).merged(zeros).tolist() == (-ones).tolist()
    assert np.allclose(coded(ones, 2 * ones, levels).merged(ones), 2)
    one = np.array([[0.5]], np.float32)
    assert coded(one, 3 * one, levels).merged(one) == pytest.approx(1.5)


@pytest.mark.parametrize("levels", LEVELS)
def test_nothing_left_of_the_base(levels):
    rng = np.random.default_rng(6)
    base, far = normal(rng, (20, 30)), random_codes((20, 30), levels, rng)
    far[1:] = 0
    for tuned in (-base, 0 * base, base + np.float32(1e5) * far.astype(np.float32)):
        with pytest.raises(ValueError, match="nothing of the base is left in it"):
            coded(base, tuned, levels)


def bytes_of(rows):
    return Tensor("I8", np.shape(rows), np.array(rows, np.uint8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"levels": 4}, "4 levels are not known"),
        ({"columns": 11}, r"codes must be I8 \[rows, 3\] for 11 columns of 3 levels, not I8 \(2, 2\)"),
        ({"columns": 0}, r"codes must be I8 \[rows, 0\]"),
        ({"codes": bytes_of([1, 2])}, "codes must be I8"),
        ({"codes": float32(np.ones((2, 2)))}, "codes must be I8 .* not F32"),
        ({"codes": bytes_of([[0, 242], [243, 0]])}, "a byte 243 of codes of 3 levels: 242 is the greatest"),
        ({"steps": float16([1, 1, 1])}, r"steps must be F16 \(2,\), one for each row, not F16 \(3,\)"),
        ({"steps": float16([[1], [1]])}, "steps must be F16"),
        ({"steps": float32(np.ones(2))}, "steps must be F16 .* not F32"),
        ({"steps": bytes_of([1, 1])}, "steps must be F16 .* not I8"),
        ({"steps": float16([1, np.nan])}, "a step is NaN, infinite or below 0"),
        ({"steps": float16([1, np.inf])}, "a step is NaN, infinite or below 0"),
        ({"steps": float16([1, -1])}, "a step is NaN, infinite or below 0"),
        ({"scale": float("nan")}, "a scale must be finite and above 0, not nan"),
        ({"scale": float("inf")}, "a scale must be finite"),
        ({"scale": 0.0}, "a scale must be finite and above 0, not 0.0"),
        ({"scale": -1.0}, "a scale must be finite"),
    ],
)
def test_what_is_no_coded_change(changed, message):
    sound = {"scale": 1.0, "levels": 3, "columns": 7}
    sound |= {"steps": float16([1, 1]), "codes": bytes_of([[0, 242], [1, 8]])}
    assert Coded(**sound).shape == (2, 7)
    with pytest.raises(ValueError, match=message):
        Coded(**(sound | changed))


def test_a_byte_too_great_for_five_levels():
    sound = {"scale": 1.0, "levels": 5, "columns": 7, "steps": float16([1, 1])}
    assert Coded(**sound, codes=bytes_of([[0, 124, 1], [1, 2, 3]])).shape == (2, 7)
    with pytest.raises(ValueError, match="a byte 125 of codes of 5 levels: 124 is the greatest"):
        Coded(**sound, codes=bytes_of([[0, 124, 1], [1, 125, 3]]))
    with pytest.raises(ValueError, match=r"codes must be I8 \[rows, 4\] for 10 columns of 5 levels"):
        Coded(**(sound | {"columns": 10}), codes=bytes_of([[0, 124, 1], [1, 2, 3]]))


def test_bytes_are_no_weights():
    with pytest.raises(ValueError, match="type I8 holds codes, not weights"):
        bytes_of([[1, 2]]).dequantize()
