"""Tensor and Model: what they accept and what they say when they do not."""

import numpy as np
import pytest

from prosparse.model.model import Model, Tensor


def test_tensor_sizes():
    tensor = Tensor("Q8_0", (3, 64), np.zeros((3, 68), np.uint8))
    assert (tensor.data_shape, tensor.nbytes) == ((3, 68), 204)
    assert tensor.dequantize().shape == (3, 64)


def test_data_of_a_function_is_not_kept():
    calls = []

    def data():
        calls.append(1)
        return np.zeros(16, np.uint8)

    tensor = Tensor("F32", (4,), data)
    assert not calls
    tensor.dequantize()
    tensor.dequantize()
    assert len(calls) == 2


def test_dequantized_weights_are_a_copy():
    data = np.zeros(16, np.uint8)
    Tensor("F32", (4,), data).dequantize()[:] = 1
    assert not data.any()


@pytest.mark.parametrize(
    ("kind", "shape", "data", "message"),
    [
        ("Q9", (4,), np.zeros(16, np.uint8), "unknown tensor type 'Q9'"),
        ("F32", (4, 1, 1), np.zeros((4, 1, 4), np.uint8), "shape"),
        ("F32", (), np.zeros((), np.uint8), "shape"),
        ("F32", (0,), np.zeros(0, np.uint8), "shape"),
        ("Q8_0", (33,), np.zeros(34, np.uint8), "multiple of 32"),
        ("F32", (4,), np.zeros(4, np.float32), "contiguous uint8"),
        ("F32", (4,), np.zeros(15, np.uint8), "contiguous uint8"),
        ("F32", (2, 2), np.zeros((2, 16), np.uint8)[:, ::2], "contiguous uint8"),
    ],
)
def test_tensor_refuses(kind, shape, data, message):
    with pytest.raises(ValueError, match=message):
        Tensor(kind, shape, data)


def test_wrong_data_of_a_function_is_refused():
    with pytest.raises(ValueError, match="contiguous uint8"):
        _ = Tensor("F32", (4,), lambda: np.zeros(4, np.uint8)).data


def changed(model, **tensors):
    kept = dict(model.tensors) | tensors
    return {name: tensor for name, tensor in kept.items() if tensor is not None}


def test_model_checks_its_tensors(tiny_model):
    model = tiny_model()
    assert model.size_bytes == sum(t.nbytes for t in model.tensors.values())
    one = Tensor("F32", (1,), np.zeros(4, np.uint8))
    for change, message in (
        ({"model.norm.weight": None}, "tensor model.norm.weight is missing"),
        ({"model.norm.weight": one}, r"tensor model.norm.weight has shape \(1,\), the config says \(96,\)"),
        ({"extra.weight": one}, "tensor extra.weight is not part of a llama model"),
    ):
        with pytest.raises(ValueError, match=message):
            Model(model.config, changed(model, **change), model.tokenizer, "bad")
