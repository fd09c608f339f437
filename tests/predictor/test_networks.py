"""Scores in torch against `model.predictor.scores`, with weights as they are stored; bytes."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prosparse.model.predictor import Predictors, scores  # noqa: E402
from prosparse.predictor import networks  # noqa: E402


def made(kind, type, seed=0):
    rng = np.random.default_rng(seed)
    pairs = tuple(
        (
            networks.stored(rng.standard_normal((64, 96)).astype(np.float32), type),
            networks.stored(rng.standard_normal((160, 64)).astype(np.float32), type),
        )
        for _ in range(2)
    )
    return Predictors(
        kind, "normed", (0.9, 0.97), ((1.0, 0.5),) * 2, 0.97, pairs if kind == "lowrank" else (), type
    )


@pytest.mark.parametrize("kind", ["lowrank", "sketch", "sign"])
@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0"])
def test_scores_are_those_of_the_plain_twin(tiny_model, kind, type):
    model = tiny_model(act="relu", type="Q8_0")
    predictors = made(kind, type)
    x = np.random.default_rng(1).standard_normal((33, 96)).astype(np.float32)
    x[0, :5] = 0
    for layer in range(2):
        weights = networks.weights_of(predictors, model, layer)
        gate = model.tensors[networks.GATE.format(layer)].dequantize()
        match kind:
            case "lowrank":
                expected = tuple(tensor.dequantize() for tensor in predictors.networks[layer])
            case "sketch":
                expected = (networks.stored(gate, type).dequantize(),)
            case "sign":
                expected = (gate,)
        assert all(np.array_equal(a, b) for a, b in zip(weights, expected, strict=True))
        got = networks.scorer(kind, weights)(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(got, scores(kind, x, weights), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="do not make"):
        networks.scorer(kind, (*weights, *weights, *weights))


def test_bytes_are_those_that_are_stored(tiny_model):
    model = tiny_model(act="relu", type="Q8_0")
    lowrank = made("lowrank", "Q4_0")
    stored = [sum(tensor.data.nbytes for tensor in pair) for pair in lowrank.networks]
    assert networks.predictor_bytes(lowrank, model) == stored
    assert stored[0] == networks.rank_bytes(model, "Q4_0") * 64
    sketch = replace(made("sketch", "Q4_0"))
    assert networks.predictor_bytes(sketch, model) == [160 * 96 // 32 * 18] * 2
    assert networks.predictor_bytes(made("sign", "Q4_0"), model) == [160 * 2 * 8] * 2  # 96 bits: two words


def test_rows_that_do_not_fill_blocks_are_refused():
    with pytest.raises(ValueError, match="another --rank"):
        networks.stored(np.zeros((160, 40), np.float32), "Q8_0")
    assert networks.stored(np.zeros((160, 40), np.float32), "F16").shape == (160, 40)
