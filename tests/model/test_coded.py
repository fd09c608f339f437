"""Coded changes: the native coder and merging against naive twins, and what is found of a change."""

from itertools import product

import numpy as np
import pytest

import naive_codes
from prosparse import _core
from prosparse.model.coded import LEVELS, Coded, coded, encoded, float16
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


def sizes_of_all_kinds(shape, spread, rng):
    return np.rint(spread * rng.standard_normal(shape) ** 3).clip(-32767, 32767).astype(np.int16)


@pytest.mark.parametrize("spread", [0, 0.1, 0.7, 5, 3000])
@pytest.mark.parametrize("shape", SHAPES)
def test_coding_against_the_naive_twin(shape, spread):
    codes = sizes_of_all_kinds(shape, spread, np.random.default_rng(0))
    data = encoded(codes).data
    assert bytes(data) == naive_codes.encoded(codes)
    found = _core.decode_codes(data, *shape)
    assert found.dtype == np.int16 and np.array_equal(found, codes)
    assert naive_codes.decoded(data, *shape) == codes.tolist()


def test_the_greatest_codes():
    codes = np.array([[32767, -32767, 15, 16, -17, 0, 1]], np.int16)
    assert np.array_equal(_core.decode_codes(encoded(codes).data, 1, 7), codes)
    with pytest.raises(ValueError, match="codes must be above -32768"):
        encoded(np.full((2, 2), -32768))


def entropy(codes):
    share = np.unique(codes, return_counts=True)[1] / codes.size
    return -np.sum(share * np.log2(share)) * codes.size / 8


@pytest.mark.parametrize("zeros", [0.1, 0.5, 0.9])
def test_codes_take_little_more_than_their_entropy(zeros):
    rng = np.random.default_rng(1)
    codes = random_codes((400, 500), 5, rng, zeros)
    assert 0.999 * entropy(codes) < encoded(codes).nbytes < 1.02 * entropy(codes) + 64


def test_rows_and_columns_that_move_more_are_made_use_of():
    rng = np.random.default_rng(2)
    sizes = np.exp(rng.standard_normal((300, 1)) + rng.standard_normal(500))
    codes = np.rint(0.3 * sizes * rng.standard_normal((300, 500)))
    assert encoded(codes).nbytes < 0.85 * entropy(codes)
    assert encoded(np.zeros((1000, 1000))).nbytes < 400


def test_other_bytes_are_refused():
    rng = np.random.default_rng(3)
    data = encoded(sizes_of_all_kinds((30, 40), 20, rng)).data
    for wrong in (data[:0], data[:3], data[:-1], np.append(data, data[:1])):
        with pytest.raises(ValueError, match="not those of codes of this shape"):
            _core.decode_codes(np.ascontiguousarray(wrong), 30, 40)
    for shape in ((30, 41), (31, 40), (20, 40)):
        with pytest.raises(ValueError, match="not those of codes of this shape"):
            _core.decode_codes(data, *shape)
    for shape in ((1 << 20, 1 << 20), (1 << 40, 1 << 40), (1 << 63, 2)):
        with pytest.raises(ValueError, match="too few bytes for so many codes"):
            _core.decode_codes(data, *shape)
    for _ in range(300):  # whatever is found, nothing outside is read or written
        noise = rng.integers(0, 256, rng.integers(0, 200), np.uint8)
        try:
            _core.decode_codes(noise, 30, 40)
        except ValueError:
            continue


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_columns", [False, True])
def test_merging_against_the_naive_twin(shape, with_columns):
    rng = np.random.default_rng(1)
    base, steps, codes = normal(rng, shape), some_steps(rng, shape[0]), random_codes(shape, 5, rng)
    column_steps = some_steps(rng, shape[1], 1)
    stream = encoded(codes)
    columns = float16(column_steps) if with_columns else None
    change = Coded(0.7, shape[1], float16(steps), columns, stream)
    assert change.shape == shape
    assert change.nbytes == 2 * shape[0] + stream.nbytes + 2 * shape[1] * with_columns
    merged, scale = change.merged(base), np.float32(0.7)
    assert merged.dtype == np.float32
    for row in range(shape[0]):
        for column in range(shape[1]):
            step = np.float32(codes[row, column]) * steps[row]
            step *= column_steps[column] if with_columns else 1
            assert merged[row, column] == scale * (base[row, column] + step)


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
        assert np.array_equal(found.codes(), codes)
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
    assert np.array_equal(found.codes(), codes)
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


def bytes_of(*values):
    return Tensor("I8", np.shape(values), np.array(values, np.uint8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": 0}, "codes must be I8 .* of 0 columns"),
        ({"stream": bytes_of([1, 2])}, r"codes must be I8 \[bytes\], of columns, not I8 \(1, 2\)"),
        ({"stream": float32(np.ones(2))}, "codes must be I8 .* not F32"),
        ({"steps": float16([[1], [1]])}, "steps must be F16, one for each row"),
        ({"steps": float32(np.ones(2))}, "steps must be F16, one for each row, not F32"),
        ({"steps": bytes_of(1, 1)}, "steps must be F16, one for each row, not I8"),
        ({"column_steps": float16([1, 1])}, r"one for each column, not F16 \(2,\) for 3 columns"),
        ({"column_steps": float32(np.ones(3))}, "one for each column, not F32"),
        ({"steps": float16([1, np.nan])}, "a step is NaN, infinite or below 0"),
        ({"steps": float16([1, np.inf])}, "a step is NaN, infinite or below 0"),
        ({"steps": float16([1, -1])}, "a step is NaN, infinite or below 0"),
        ({"column_steps": float16([1, 0, -1])}, "a step is NaN, infinite or below 0"),
        ({"scale": float("nan")}, "a scale must be finite and above 0, not nan"),
        ({"scale": float("inf")}, "a scale must be finite"),
        ({"scale": 0.0}, "a scale must be finite and above 0, not 0.0"),
        ({"scale": -1.0}, "a scale must be finite"),
    ],
)
def test_what_is_no_coded_change(changed, message):
    sound = {"scale": 1.0, "columns": 3, "steps": float16([1, 1]), "column_steps": float16([1, 0, 1])}
    sound |= {"stream": encoded(np.ones((2, 3)))}
    assert Coded(**sound).shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        Coded(**(sound | changed))


def test_bytes_are_no_weights():
    with pytest.raises(ValueError, match="type I8 holds codes, not weights"):
        bytes_of([1, 2]).dequantize()
