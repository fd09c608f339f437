"""Activations against their formulas, at the edges where definitions differ."""

import numpy as np
import pytest

from prosparse.model.activation import NAMES, Activation

X = np.array(
    [-np.inf, -200, -3, -0.25, -0.0, 0, 0.25, 0.5, np.nextafter(np.float32(0.5), 0), 3, 200], np.float32
)


def test_relu_family():
    assert np.array_equal(Activation("relu")(X), np.where(X > 0, X, 0))
    assert np.array_equal(Activation("fatrelu", 0.5)(X), np.where(X >= 0.5, X, 0))
    assert np.array_equal(Activation("shiftrelu", 0.5)(X), np.where(X > 0.5, X - np.float32(0.5), 0))


def test_fatrelu_keeps_its_threshold():
    t = np.float32(0.03)
    x = np.array([t, np.nextafter(t, np.float32(0))], np.float32)
    assert Activation("fatrelu", 0.03)(x).tolist() == [t, 0]


def test_fatrelu_with_a_very_low_threshold_keeps_everything():
    assert np.array_equal(Activation("fatrelu", -1e30)(X[1:]), X[1:])


@pytest.mark.parametrize(("name", "torch_name"), [("silu", "silu"), ("gelu", "gelu_pytorch_tanh")])
def test_smooth_ones_equal_transformers(name, torch_name):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    expected = ACT2FN[torch_name](torch.from_numpy(x)).numpy()
    assert np.allclose(Activation(name)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_float32_in_float32_out_without_warnings(name):
    act = Activation.parse(name, 0.1 if name in ("fatrelu", "shiftrelu") else None)
    with np.errstate(all="raise", under="ignore"):
        out = act(np.linspace(-80, 80, 63, dtype=np.float32))
    assert out.dtype == np.float32
    assert act.sparse == (out[30] == 0) == (name in ("relu", "fatrelu", "shiftrelu"))


@pytest.mark.parametrize(
    ("name", "param", "expected"),
    [
        ("swish", None, Activation("silu")),
        ("relu", 0.0, Activation("relu")),
        ("gelu_pytorch_tanh", None, Activation("gelu")),
        ("fatrelu", 0.01, Activation("fatrelu", 0.01)),
        ("fatrelu_0.01", None, Activation("fatrelu", 0.01)),
        ("fatrelu_0.01", 0.01, Activation("fatrelu", 0.01)),
        ("shiftrelu", 1, Activation("shiftrelu", 1.0)),
    ],
)
def test_parse(name, param, expected):
    assert Activation.parse(name, param) == expected


@pytest.mark.parametrize(
    ("name", "param", "message"),
    [
        ("mish", None, "unknown activation 'mish': known are silu, relu"),
        ("", None, "unknown activation"),
        (3, None, "hidden_act must be a string"),
        ("fatrelu", None, "needs hidden_act_param"),
        ("fatrelu", float("nan"), "must be finite"),
        ("fatrelu", float("inf"), "must be finite"),
        ("fatrelu", "0.1", "must be a number"),
        ("fatrelu", True, "must be a number"),
        ("fatrelu_high", None, "write fatrelu_<number>"),
        ("fatrelu_0.1", 0.2, "contradicts"),
        ("relu", 0.1, "relu takes no hidden_act_param"),
        ("silu", 1.0, "silu takes no hidden_act_param"),
    ],
)
def test_parse_refuses(name, param, message):
    with pytest.raises(ValueError, match=message):
        Activation.parse(name, param)
