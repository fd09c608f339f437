"""The verb `threshold`: every point, the pick and what is written, against brute force."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from prosparse import cli
from prosparse.formats import open_model
from prosparse.formats.hf import write_folder
from prosparse.model.activation import Activation
from prosparse.sparsify import measure, threshold
from prosparse.sparsify.batches import Batch

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def batch_of(sequences: int, context: int = 16, seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 256, (sequences, context + 1))
    return Batch(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape, np.int32))


def trunk_of(model, activation: Activation):
    return measure.load(model, "cpu", activation)[0]


@pytest.mark.parametrize("own", [0.0, 0.2])
def test_a_grid_is_the_model_with_other_thresholds(tiny_model, own):
    model = tiny_model(act="fatrelu", act_param=own)
    trunk = trunk_of(model, Activation("fatrelu", own))
    evaluation = batch_of(4, seed=1)
    found = threshold.search(trunk, batch_of(2), evaluation, {"grid": (0.5, 0.1, 0.3)}, max_ppl=1e9)
    assert [p.parameter for p in found.points] == [t for t in (0.1, 0.3, 0.5) if t > own]
    given = measure.measure(trunk_of(model, Activation("fatrelu", own)), evaluation)
    for point in (found.given, *found.points):
        t = point.parameter
        alone = measure.measure(trunk_of(model, Activation("fatrelu", t)), evaluation)
        assert point.thresholds == (float(np.float32(t)),) * 2
        assert point.loss == alone.loss
        assert point.ppl == math.exp(alone.loss)
        assert point.ratio == pytest.approx(math.exp(alone.loss) / math.exp(given.loss), rel=1e-9)
        assert point.layer_sparsity == tuple(alone.sparsity)
        assert point.sparsity == pytest.approx(alone.sparsity.mean())
    assert found.pick.parameter == 0.5
    assert [float(mlp.threshold) for mlp in trunk.mlps] == [float(np.float32(own))] * 2


def test_layers_get_thresholds_of_their_own(tiny_model):
    model = tiny_model(act="relu")
    trunk = trunk_of(model, Activation("fatrelu", 0.0))
    calibration, evaluation = batch_of(3), batch_of(3, seed=1)
    values = {"quantile": (0.2, 0.5), "cett": (0.1,)}
    found = threshold.search(trunk, calibration, evaluation, values)
    known = measure.Calibration(trunk, calibration)
    expected = [known.quantile(0.2), known.quantile(0.5), known.cett(0.1)]
    for point, thresholds in zip(found.points, expected, strict=True):
        assert point.thresholds == tuple(thresholds.astype(np.float32).tolist())
        alone = trunk_of(model, Activation("fatrelu", 0.0))
        for mlp, value in zip(alone.mlps, thresholds, strict=True):
            mlp.threshold.fill_(value)
        assert point.loss == measure.measure(alone, evaluation).loss
    # a share p of open gates closes, on the text it was calibrated on
    alone_sparsity = measure.measure(trunk, calibration).sparsity
    threshold.set_thresholds(trunk, expected[1])
    closed = measure.measure(trunk, calibration).sparsity
    assert closed[0] == pytest.approx(alone_sparsity[0] + 0.5 * (1 - alone_sparsity[0]), abs=1e-3)


def test_the_pick_is_the_sparsest_within_the_limit(tiny_model):
    trunk = trunk_of(tiny_model(act="relu"), Activation("fatrelu", 0.0))
    values = {"grid": tuple(np.linspace(0.01, 0.8, 5)), "quantile": (0.1, 0.5), "cett": (0.1,)}
    for limit in (1.0, 1.01, 1.1, 100.0):
        found = threshold.search(trunk, batch_of(2), batch_of(6, seed=1), values, max_ppl=limit)
        allowed = [p for p in (found.given, *found.points) if p.ratio <= limit]
        assert found.pick in allowed
        assert found.pick.sparsity == max(p.sparsity for p in allowed)
    assert found.pick.sparsity == max(p.sparsity for p in found.points)


def test_refining_halves_towards_the_limit(tiny_model):
    trunk = trunk_of(tiny_model(act="relu"), Activation("fatrelu", 0.0))
    calibration, evaluation = batch_of(2), batch_of(6, seed=1)
    coarse = threshold.search(trunk, calibration, evaluation, {"grid": (0.01, 2.0)}, max_ppl=1.05)
    assert [p.ratio <= 1.05 for p in coarse.points] == [True, False]
    fine = threshold.search(trunk, calibration, evaluation, {"grid": (0.01, 2.0)}, max_ppl=1.05, refine=7)
    assert fine.points[:2] == coarse.points
    low, high = 0.01, 2.0
    for point in fine.points[2:]:
        assert point.parameter == (low + high) / 2
        low, high = (point.parameter, high) if point.ratio <= 1.05 else (low, point.parameter)
    assert len(fine.points) == 9
    assert fine.pick.sparsity >= coarse.pick.sparsity
    # nothing to halve where everything is within the limit
    assert (
        len(threshold.search(trunk, calibration, evaluation, {"cett": (0.1,)}, max_ppl=1e9, refine=3).points)
        == 1
    )


def test_default_values_follow_the_model(tiny_model):
    trunk = trunk_of(tiny_model(act="fatrelu", act_param=0.015), Activation("fatrelu", 0.015))
    calibration = batch_of(2)
    found = threshold.search(trunk, calibration, batch_of(2, seed=1), {"grid": None, "cett": None})
    grid = [p.parameter for p in found.points if p.method == "grid"]
    scale = measure.Calibration(trunk, calibration).scale()
    own = float(np.float32(0.015))
    assert grid == sorted([0.02, 0.03, *(own + scale * f for f in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1))])
    assert [p.parameter for p in found.points if p.method == "cett"] == [0.02, 0.05, 0.1, 0.15, 0.2, 0.3]


def test_calibration_and_evaluation_share_no_fed_token():
    place = np.arange(9)[:, None] * 4 + np.arange(5)  # the tokens are their own places
    batch = Batch(place, np.ones(place.shape, bool), np.zeros(place.shape, np.int32))
    a, b = threshold.parts([batch, batch])
    fed_a, fed_b = set(a.tokens[:, :-1].flat), set(b.tokens[:, :-1].flat)
    assert fed_a == set(range(8))
    assert fed_b == set(range(8, 36))
    assert (len(a.tokens), len(b.tokens)) == (4, 14)
    with pytest.raises(ValueError, match="two are needed"):
        threshold.parts([batch, measure.split(batch, 1)[0]])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"grid": (0.1,)}, {"max_ppl": 0.9}, "--max-ppl"),
        ({"grid": (0.1,)}, {"max_ppl": math.nan}, "--max-ppl"),
        ({"grid": (0.1,)}, {"refine": -1}, "--refine"),
        ({"grid": (-0.1,)}, {}, "--grid takes"),
        ({"grid": (math.nan,)}, {}, "--grid takes"),
        ({"quantile": (1.0,)}, {}, "--quantile takes"),
        ({"cett": (0.0, 0.1)}, {}, "--cett takes"),
        ({"grid": (0.01, 0.05)}, {}, "threshold is 0.05 already"),
    ],
)
def test_bad_values(tiny_model, values, options, message):
    trunk = trunk_of(tiny_model(act="fatrelu_0.05"), Activation("fatrelu", 0.05))
    with pytest.raises(ValueError, match=message):
        threshold.search(trunk, batch_of(1), batch_of(1), values, **options)


def test_a_broken_model_is_told_and_thresholds_are_put_back(tiny_model, monkeypatch):
    trunk = trunk_of(tiny_model(act="relu"), Activation("fatrelu", 0.0))
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the loss is not finite")
        return measure_once(*args, **kwargs)

    measure_once = measure.measure
    monkeypatch.setattr(measure, "measure", fails)
    with pytest.raises(ValueError, match="not finite"):
        threshold.search(trunk, batch_of(1), batch_of(1), {"grid": (0.3,)})
    assert [float(mlp.threshold) for mlp in trunk.mlps] == [0.0, 0.0]


TEXT = "the quick brown fox jumps over the lazy dog, and over the other one. " * 5


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(10)))
    return path


def arguments(model, data, out, *more: str) -> list[str]:
    sizes = ["--tokens", "512", "--context", "32", "--device", "cpu", "--json"]
    return ["threshold", "-m", str(model), "--data", str(data), "--out", str(out), *sizes, *more]


@pytest.mark.parametrize("act", ["relu", "fatrelu_0.1"])
def test_what_is_written_runs_in_the_engine(tmp_path, tiny_model, data, capsys, act):
    pytest.importorskip("matplotlib")
    from prosparse.engine.engine import LLM

    write_folder(tmp_path / "tiny", tiny_model(act=act), "F32")
    more = [
        "--max-ppl",
        "1.2",
        "--method",
        "quantile,grid",
        "--method",
        "cett",
        "--type",
        "f32",
        "--refine",
        "1",
    ]
    assert cli.main(arguments(tmp_path / "tiny", data, tmp_path / "out", *more)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "out" / "threshold.json").read_text())
    assert (tmp_path / "out" / "threshold.png").read_bytes().startswith(b"\x89PNG")
    assert {p["method"] for p in report["points"]} == {"quantile", "grid", "cett"}
    assert report["pick"] == result["pick"]
    assert (report["calibration_tokens"], report["evaluation_tokens"]) == (128, 384)
    pick = report["pick"]
    assert pick["ratio"] <= 1.2
    assert pick["sparsity"] > report["given"]["sparsity"]
    # the folder, in numpy, on the text that was evaluated
    model = open_model(result["model"])
    assert (model.config.activation.name, model.config.activation.param) == (
        result["hidden_act"],
        result["hidden_act_param"],
    )
    encoder = measure.Encoder(model.tokenizer, 256, (257,))
    _, evaluation = threshold.parts([measure.sample(str(data), encoder, 512, 32)])
    active = neurons = loss = 0.0
    for tokens in evaluation.tokens:
        llm = LLM(model, backend="naive")
        logits = llm.forward(tokens[:-1], all_logits=True).astype(np.float64)
        loss -= (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(32), tokens[1:]].sum()
        stats = llm.stats()
        active, neurons = active + stats["prefill_active"], neurons + stats["prefill_neurons"]
    assert loss / 384 == pytest.approx(pick["loss"], rel=1e-3)
    assert 1 - active / neurons == pytest.approx(pick["sparsity"], abs=1e-3)


def test_a_model_in_which_nothing_may_change_is_written_as_given(tmp_path, tiny_model, data, capsys):
    original = tiny_model(act="fatrelu_0.1")
    write_folder(tmp_path / "tiny", original, "F32")
    more = ["--method", "grid", "--grid", "3,4", "--max-ppl", "1", "--refine", "0", "--type", "f32"]
    assert cli.main(arguments(tmp_path / "tiny", data, tmp_path / "out", *more)) == 0
    assert "no threshold stays within 1:" in capsys.readouterr().out
    model = open_model(tmp_path / "out" / "model")
    assert model.config.activation == Activation("fatrelu", float(np.float32(0.1)))
    for name, tensor in original.tensors.items():
        assert np.array_equal(model.tensors[name].data, tensor.data)


@pytest.mark.parametrize(
    ("act", "more", "message"),
    [
        ("silu", [], "activation is silu 0: thresholds are raised for relu and fatrelu"),
        ("shiftrelu_0.1", [], "make the model sparse first"),
        ("relu", ["--method", "grid,best"], "unknown method 'best'"),
        ("relu", ["--context", "1024", "--tokens", "4096"], "lower --context"),
        ("relu", ["--micro", "0"], "--micro"),
        ("relu", ["--tokens", "32"], "two are needed"),
        ("relu", ["--data", "nowhere.jsonl"], "does not exist"),
    ],
)
def test_mistakes(tmp_path, tiny_model, data, capsys, act, more, message):
    write_folder(tmp_path / "tiny", tiny_model(act=act), "F32")
    assert cli.main(arguments(tmp_path / "tiny", data, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_there_is_not_overwritten(tmp_path, tiny_model, data, capsys):
    write_folder(tmp_path / "tiny", tiny_model(act="relu"), "F32")
    write_folder(tmp_path / "out" / "model", tiny_model(act="relu"), "F32")
    assert cli.main(arguments(tmp_path / "tiny", data, tmp_path / "out")) == 2
    assert "name a new folder" in capsys.readouterr().err


def test_negative_thresholds_are_refused():
    with pytest.raises(ValueError, match="from 0 up"):
        threshold.searchable(Activation("fatrelu", -0.1))
    assert threshold.searchable(Activation("relu")) == Activation("fatrelu", 0.0)


def test_weights_that_the_type_cannot_hold_are_told(tmp_path, tiny_model, data, capsys):
    model = tiny_model(act="relu")
    name = "model.layers.0.mlp.gate_proj.weight"
    big = model.tensors[name].dequantize() * np.float32(1e6)
    tensors = dict(model.tensors) | {name: type(model.tensors[name])("F32", big.shape, big.view(np.uint8))}
    write_folder(tmp_path / "tiny", replace(model, tensors=tensors), "F32")
    more = ["--type", "f16", "--method", "grid", "--grid", "0.1"]
    assert cli.main(arguments(tmp_path / "tiny", data, tmp_path / "out", *more)) == 2
    assert "--type bf16" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("verb", ["threshold", "stats"])
def test_help_imports_no_torch(verb):
    code = (
        "import sys\nfrom prosparse import cli\n"
        f"try: cli.main([{verb!r}, '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
