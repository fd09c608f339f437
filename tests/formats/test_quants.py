"""Quantisation, repacking and damage checks."""

import numpy as np
import pytest

from prosparse.formats.quants import NATIVE, TYPE_IDS, check_scales, quantize, to_native
from prosparse.model.model import BLOCKS, Tensor

SCALES = {"Q6_K": (208, 2), "Q3_K": (108, 2), "Q2_K": (80, 4)}
SCALES |= {kind: (0, 4) for kind in ("Q5_1", "Q4_1", "Q4_K", "Q5_K")}


def random_tensor(kind, rows=16, columns=1024):
    """Random levels with scales as in real files; every type, also those only others can write."""
    rng = np.random.default_rng(0)
    if kind in ("F32", "F16", "BF16"):
        return Tensor(kind, (rows, columns), quantize(rng.standard_normal((rows, columns)), kind))
    block, size = BLOCKS[kind]
    data = rng.integers(0, 256, (rows, columns // block * size), np.uint8)
    offset, count = SCALES.get(kind, (0, 2))
    blocks = data.reshape(-1, size)
    scales = rng.normal(0, 0.001, (len(blocks), count // 2)).astype(np.float16)
    blocks[:, offset : offset + count] = scales.view(np.uint8)
    return Tensor(kind, (rows, columns), data)


def test_type_table_equals_the_gguf_package():
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, number in TYPE_IDS.items():
        assert GGMLQuantizationType[name] == number
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == BLOCKS[name]
    assert TYPE_IDS.keys() == BLOCKS.keys()


@pytest.mark.parametrize("kind", BLOCKS)
def test_dequantize_equals_the_gguf_package(kind):
    from gguf import GGMLQuantizationType, quants

    tensor = random_tensor(kind)
    data = tensor.data if kind not in ("F32", "F16") else tensor.data.view(f"f{BLOCKS[kind][1]}")
    expected = quants.dequantize(data, GGMLQuantizationType[kind])
    assert tensor.dequantize().dtype == np.float32
    assert np.array_equal(tensor.dequantize(), expected)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("F32", 0),
        ("F16", 5e-4),
        ("BF16", 4e-3),
        ("Q8_0", 0.006),
        ("Q5_1", 0.04),
        ("Q4_1", 0.08),
        ("Q4_0", 0.09),
    ],
)
def test_quantize_loses_little(kind, most):
    values = np.random.default_rng(1).standard_normal((32, 256)).astype(np.float32)
    back = Tensor(kind, values.shape, quantize(values, kind)).dequantize()
    assert np.sqrt(np.square(back - values).mean()) <= most


@pytest.mark.parametrize("kind", NATIVE)
def test_quantising_again_changes_nothing(kind):
    values = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    once = Tensor(kind, values.shape, quantize(values, kind)).dequantize()
    twice = Tensor(kind, values.shape, quantize(once, kind)).dequantize()
    # the minima of Q4_1 and Q5_1 are found from rounded values the second time
    assert np.allclose(once, twice, atol=2e-3 if kind in ("Q4_1", "Q5_1") else 0)


def test_too_large_for_f16_is_refused():
    with pytest.raises(ValueError, match="too large for F16"):
        quantize(np.full((1, 32), 1e6, np.float32), "F16")


@pytest.mark.parametrize(
    ("kind", "native", "loss"),
    [
        ("Q5_0", "Q5_1", 0.0),
        ("Q4_K", "Q4_1", 5e-4),
        ("Q5_K", "Q5_1", 5e-4),
        ("Q6_K", "Q8_0", 6e-3),
        ("Q3_K", "Q8_0", 6e-3),
        ("Q2_K", "Q8_0", 6e-3),
        ("IQ4_NL", "Q8_0", 6e-3),
        ("IQ4_XS", "Q8_0", 6e-3),
    ],
)
def test_to_native(kind, native, loss, monkeypatch):
    tensor = random_tensor(kind)
    values = tensor.dequantize()
    repacked = to_native(tensor)
    assert (repacked.type, repacked.shape) == (native, tensor.shape)
    assert np.sqrt(np.square(repacked.dequantize() - values).mean() / values.var()) <= loss
    monkeypatch.setattr("prosparse.formats.quants._WEIGHTS_AT_ONCE", 3000)
    assert np.array_equal(to_native(tensor).data, repacked.data)


@pytest.mark.parametrize("kind", NATIVE)
def test_native_tensors_stay(kind):
    tensor = random_tensor(kind)
    assert to_native(tensor) is tensor


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if BLOCKS[kind][0] > 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_scales_are_found(kind, bad):
    tensor = random_tensor(kind)
    check_scales("t", tensor)
    offset, count = SCALES.get(kind, (0, 2))
    for place in range(offset, offset + count, 2):
        data = tensor.data.copy()
        block = data.reshape(-1, BLOCKS[kind][1])[-1]
        block[place : place + 2] = np.array([bad], np.float16).view(np.uint8)
        with pytest.raises(ValueError, match="tensor t: NaN or infinite scales"):
            check_scales("t", Tensor(kind, tensor.shape, data))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_bad_values_in_vectors_are_found(kind):
    values = np.ones(32, np.float32)
    check_scales("t", Tensor(kind, (32,), quantize(values, kind)))
    data = quantize(values, kind)
    data[-2:] = 0xFF
    with pytest.raises(ValueError, match="tensor t: NaN or infinite values"):
        check_scales("t", Tensor(kind, (32,), data))
