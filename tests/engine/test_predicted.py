"""Predicted mode: the native engine against its twin, and against exact mode where predictors are perfect."""

from dataclasses import replace

import numpy as np
import pytest
from test_core_vs_naive import TOKENS, close, decode

from prosparse.engine.engine import LLM
from prosparse.formats import quants
from prosparse.model.model import Model, Tensor
from prosparse.model.predictor import Predictors, scores

pytest.importorskip("prosparse._core")


def stored(values: np.ndarray, type: str) -> Tensor:
    values = values.astype(np.float32)
    if type == "F32":
        return Tensor(type, values.shape, np.ascontiguousarray(values).view(np.uint8))
    return Tensor(type, values.shape, quants.quantize(values, type))


def with_predictors(model: Model, kind: str, thresholds, *, rank=32, input="normed", type="F32") -> Model:
    """Random networks, or what the kind derives from the gate; one threshold for all layers and recalls."""
    c = model.config
    rng = np.random.default_rng(5)
    networks = ()
    if kind == "lowrank":
        networks = tuple(
            (
                stored(rng.standard_normal((rank, c.hidden_size)), type),
                stored(rng.standard_normal((c.intermediate_size, rank)) / rank, type),
            )
            for _ in range(c.num_hidden_layers)
        )
    calibrated = tuple(tuple(thresholds) for _ in range(c.num_hidden_layers))
    recalls = (0.5, 0.9, 1.0)[-len(thresholds) :]
    return replace(model, predictors=Predictors(kind, input, recalls, calibrated, recalls[-1], networks))


def compare(model: Model, recall: float | None = None, share: float = 1.0) -> LLM:
    twin = LLM(model, backend="naive", mode="predicted", recall=recall)
    llm = LLM(model, mode="predicted", recall=recall, n_threads=2)
    close(decode(llm, TOKENS), decode(twin, TOKENS), share)
    got, want = llm.stats(), twin.stats()
    assert (got["tokens"], got["neurons"]) == (want["tokens"], want["neurons"])
    for name in ("active", "candidates"):
        assert abs(got[name] - want[name]) <= 0.01 * want["neurons"], name
    assert 0 < got["active"] < got["candidates"] < got["neurons"]
    return llm


@pytest.mark.parametrize("input", ["normed", "residual"])
@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0", "Q4_0"])
def test_lowrank(tiny_model, type, input):
    model = tiny_model(type=type, act="relu")
    # a score at the threshold may fall to either side, and what it names then counts or not
    compare(with_predictors(model, "lowrank", [0.0], input=input, type=type), share=0.8)


@pytest.mark.parametrize("kind", ["sketch", "sign"])
@pytest.mark.parametrize("type", ["F32", "Q8_0", "Q5_1"])
def test_from_the_gate(tiny_model, kind, type):
    model = tiny_model(type=type, act="fatrelu_0.1", intermediate=224)
    compare(with_predictors(model, kind, [2.0 if kind == "sign" else 0.05]), share=0.8)


@pytest.mark.parametrize(("hidden", "intermediate", "rank"), [(50, 63, 7), (66, 130, 33), (6, 7, 1)])
def test_odd_sizes(tiny_model, hidden, intermediate, rank):
    model = tiny_model(act="relu", hidden=hidden, intermediate=intermediate, heads=2, kv=1, head_dim=10)
    twin_model = with_predictors(model, "lowrank", [0.0], rank=rank)
    close(
        decode(LLM(twin_model, mode="predicted", n_threads=2), TOKENS),
        decode(LLM(twin_model, backend="naive", mode="predicted"), TOKENS),
        0.8,
    )
    sign = with_predictors(model, "sign", [0.0])
    llm, twin = LLM(sign, mode="predicted"), LLM(sign, backend="naive", mode="predicted")
    close(decode(llm, TOKENS), decode(twin, TOKENS), 0.8)


@pytest.mark.parametrize("backend", ["cpu", "naive"])
@pytest.mark.parametrize("kind", ["lowrank", "sketch", "sign"])
def test_a_predictor_that_names_all_is_exact_mode(tiny_model, kind, backend):
    model = tiny_model(type="Q8_0", act="relu", intermediate=224)
    named = with_predictors(model, kind, [-1e30], type="Q8_0")
    predicted, exact = (LLM(named, mode=mode, backend=backend) for mode in ("predicted", "exact"))
    tokens = TOKENS[:12]  # then exact mode finds the model too dense to skip
    if backend == "cpu":
        np.testing.assert_array_equal(decode(predicted, tokens), decode(exact, tokens))
    else:
        close(decode(predicted, tokens), decode(exact, tokens))
    assert predicted.stats()["candidates"] == predicted.stats()["neurons"]
    assert predicted.stats()["active"] == exact.stats()["active"]


def test_a_perfect_predictor_is_exact_mode(tiny_model):
    """The gate is its own sketch: candidates are the active neurons."""
    model = tiny_model(type="Q4_0", act="fatrelu_0.2", intermediate=224)
    # Q4_0 of Q4_0 is the same numbers
    perfect = with_predictors(model, "sketch", [0.2])
    predicted, exact = LLM(perfect, mode="predicted"), LLM(perfect, mode="exact")
    np.testing.assert_array_equal(decode(predicted, TOKENS[:12]), decode(exact, TOKENS[:12]))
    stats = predicted.stats()
    assert stats["candidates"] == stats["active"] == exact.stats()["active"]


def test_threads_change_nothing(tiny_model):
    model = with_predictors(tiny_model(type="Q8_0", act="relu", intermediate=1600), "lowrank", [0.0])
    one, three = (decode(LLM(model, mode="predicted", n_threads=n), TOKENS) for n in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_recall_moves_thresholds(tiny_model):
    model = with_predictors(tiny_model(act="relu"), "lowrank", [0.5, 0.0, -0.5])
    found = {}
    for recall in (0.5, 0.7, 0.9, 1.0):
        llm = LLM(model, mode="predicted", recall=recall)
        decode(llm, TOKENS[:8])
        found[recall] = llm.stats()["candidates"]
    assert found[0.5] < found[0.7] < found[0.9] < found[1.0]
    assert model.predictors.at(0.7).tolist() == pytest.approx([0.25, 0.25])
    for recall in (0.4, 1.1):
        with pytest.raises(ValueError, match="was not calibrated"):
            LLM(model, mode="predicted", recall=recall)


def test_prompts_are_exact_and_logprobs_are_predicted(tiny_model):
    model = with_predictors(tiny_model(act="relu"), "lowrank", [0.2])
    predicted, exact = LLM(model, mode="predicted"), LLM(model, mode="exact")
    a, b = (llm.forward(TOKENS, all_logits=True) for llm in (predicted, exact))
    np.testing.assert_array_equal(a, b)
    logits = decode(predicted, TOKENS[:-1])
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = logp[np.arange(len(TOKENS) - 1), TOKENS[1:]]
    np.testing.assert_allclose(predicted.logprobs(TOKENS), want, atol=1e-4)
    assert np.abs(predicted.logprobs(TOKENS) - exact.logprobs(TOKENS)).max() > 1e-3


def test_auto_never_keeps_what_is_slower(tiny_model, monkeypatch):
    model = with_predictors(tiny_model(act="relu"), "lowrank", [0.0])
    assert LLM(model).mode == "exact"
    llm = LLM(model, recall=1.0)
    assert llm.mode in ("exact", "predicted")
    assert "times as fast" in llm.mode_reason
    assert llm.stats()["tokens"] == 0
    decode(llm, TOKENS[:4])
    assert (llm.stats()["candidates"] > 0) == (llm.mode == "predicted")


def test_what_cannot_be(tiny_model):
    model = tiny_model(act="relu")
    with pytest.raises(ValueError, match="prosparse predict"):
        LLM(model, mode="predicted")
    with pytest.raises(ValueError, match="prosparse predict"):
        LLM(model, recall=0.9)
    with pytest.raises(ValueError, match="sparse activation"):
        LLM(tiny_model(), mode="predicted")
    named = with_predictors(model, "lowrank", [0.0])
    for mode in ("exact", "dense"):
        with pytest.raises(ValueError, match="for predicted mode"):
            LLM(named, mode=mode, recall=1.0)
    with pytest.raises(ValueError, match="for 1 layers"):
        replace(
            named,
            predictors=replace(
                named.predictors, thresholds=((0.0,),), networks=named.predictors.networks[:1]
            ),
        )
    with pytest.raises(ValueError, match="no inactive neurons"):
        replace(tiny_model(), predictors=named.predictors)
    wide = with_predictors(tiny_model(act="relu", hidden=128), "lowrank", [0.0]).predictors
    with pytest.raises(ValueError, match="the predictor of layer 0"):
        replace(model, predictors=wide)
    for changes, match in [
        ({"kind": "oracle"}, "unknown predictor"),
        ({"input": "dreams"}, "residual or normed"),
        ({"kind": "sign"}, "has no networks"),
        ({"recalls": (1.5,)}, "shares"),
        ({"default": 0.1}, "outside of the calibrated"),
        ({"thresholds": ((0.0, 1.0), (0.0, 1.0))}, "thresholds for 1 recalls"),
        ({"thresholds": ((float("nan"),), (0.0,))}, "finite"),
    ]:
        with pytest.raises(ValueError, match=match):
            replace(named.predictors, **changes)


def test_scores_by_hand():
    x = np.array([[1.0, -2.0, 0.0]], np.float32)
    gate = np.array([[1, 1, 1], [-1, -1, -1], [0, -3, 2]], np.float32)
    np.testing.assert_array_equal(scores("sign", x, [gate]), [[1, -1, 3]])
    np.testing.assert_array_equal(scores("sketch", x, [gate]), [[-1, 1, 6]])
    fc1, fc2 = np.array([[1, 0, 0], [0, 1, 0]], np.float32), np.array([[2, 5], [-1, 5]], np.float32)
    np.testing.assert_array_equal(scores("lowrank", x, [fc1, fc2]), [[2, -1]])
    with pytest.raises(ValueError, match="do not make"):
        scores("lowrank", x, [gate])


def test_a_broken_score_names_its_neuron(tiny_model):
    model = tiny_model(act="relu")
    predictors = with_predictors(model, "lowrank", [0.0]).predictors
    fc1, fc2 = predictors.networks[0]
    broken = fc2.dequantize()
    broken[:] = np.nan
    networks = ((fc1, stored(broken, "F32")), predictors.networks[1])
    named = replace(model, predictors=replace(predictors, networks=networks))
    for backend in ("cpu", "naive"):
        llm = LLM(named, mode="predicted", backend=backend)
        decode(llm, TOKENS[:2])
        assert llm.stats()["candidates"] >= 2 * model.config.intermediate_size
