"""Points, bytes and masked perplexity against a plain forward pass with neurons left out."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prosparse.model.predictor import Predictors, scores  # noqa: E402
from prosparse.predictor import metrics, networks, report  # noqa: E402
from prosparse.predictor.build import RECALLS, Wanted, build, examples, importance  # noqa: E402
from prosparse.predictor.collect import PARTS, Settings, collect, fingerprint, unpack  # noqa: E402
from prosparse.predictor.train import Training  # noqa: E402
from prosparse.sparsify import measure  # noqa: E402
from prosparse.sparsify.batches import Batch  # noqa: E402

CONTEXT, D_FF = 16, 160


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(act="fatrelu_0.5", type="Q8_0")


@pytest.fixture(scope="module")
def trunk(model):
    return measure.load(model, "cpu")[0]


@pytest.fixture(scope="module")
def parts():
    rng = np.random.default_rng(0)

    def text(n):
        tokens = rng.integers(0, 256, (n, CONTEXT + 1))
        return Batch(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape, np.int32))

    return {part: text(n) for part, n in zip(PARTS, (24, 6, 6), strict=True)}


@pytest.fixture(scope="module")
def collection(trunk, model, parts, tmp_path_factory):
    settings = Settings(context=CONTEXT, inputs=("residual", "normed"), clip=0.15)
    return collect(trunk, parts, tmp_path_factory.mktemp("c"), settings, model=fingerprint(model))


def wanted(way="lowrank", **changes):
    return Wanted(
        **{"way": way, "rank": 32, "training": Training(1, epochs=2, batch=128, decay=True)} | changes
    )


@pytest.mark.parametrize(
    ("way", "changes"),
    [
        ("lowrank", {}),
        ("lowrank", {"input": "residual", "type": "F16"}),
        ("lowrank", {"type": "Q4_0", "default": 0.93}),
        ("published", {"input": "residual", "clipped": True}),
        ("sketch", {"rank": None}),
        ("sign", {"rank": None}),
    ],
)
def test_predictors_reach_their_recalls(model, collection, tmp_path, way, changes):
    given = wanted(way, **changes)
    got = build(model, collection, given, tmp_path)
    got.check(model.config)
    assert got.recalls == tuple(sorted({*RECALLS, given.default}))
    assert (got.kind, got.default) == ("lowrank" if way == "published" else way, given.default)
    for layer in range(2):
        x = np.asarray(collection.inputs(layer, got.input, "calibrate"), np.float32)
        active = unpack(np.array(collection.active(layer, "calibrate")), D_FF)
        values = scores(got.kind, x, networks.weights_of(got, model, layer))
        for recall, threshold in zip(got.recalls, got.thresholds[layer], strict=True):
            # torch and numpy sum in another order
            slack = 1e-4 * np.abs(values).max()
            assert (values[active] >= threshold - slack).mean() >= recall
            above = values[active][values[active] > threshold + slack]
            if len(above) and got.kind != "sign":
                assert (values[active] >= above.min()).mean() < recall + 0.01


def test_points_are_those_of_brute_force(model, collection, tmp_path):
    predictors = build(model, collection, wanted(), tmp_path)
    found = report.points("lowrank", predictors, model, collection)
    assert [point.asked for point in found] == [*predictors.recalls, None]
    sizes = {name: tensor.nbytes for name, tensor in model.tensors.items()}
    for point in found:
        recalls, predicted, lean, full, exact = [], [], 0.0, 0.0, 0.0
        for layer in range(2):
            x = np.asarray(collection.inputs(layer, "normed", "report"), np.float32)
            active = unpack(np.array(collection.active(layer, "report")), D_FF)
            values = scores("lowrank", x, networks.weights_of(predictors, model, layer))
            at = 0.0 if point.asked is None else predictors.at(point.asked)[layer]
            named = values >= at
            recalls.append((named & active).sum() / active.sum())
            predicted.append(1 - named.mean())
            gate, up, down = (
                sizes[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            own = sum(tensor.nbytes for tensor in predictors.networks[layer])
            lean += own + named.mean() * gate + (named & active).mean() * (up + down)
            full += own + named.mean() * (gate + up + down)
            exact += gate + active.mean() * (up + down)
        assert point.recall == pytest.approx(np.mean(recalls), abs=2e-3)
        assert point.predicted_sparsity == pytest.approx(np.mean(predicted), abs=2e-3)
        assert point.ffn_bytes == pytest.approx(lean, rel=5e-3)
        assert point.ffn_bytes_all == pytest.approx(full, rel=5e-3)
        assert report.exact_bytes(model, point.counts) == pytest.approx(exact)
    ffn, others = report.dense_bytes(model)
    assert ffn == sum(size for name, size in sizes.items() if ".mlp." in name)
    rest = sum(size for name, size in sizes.items() if ".mlp." not in name)
    embedding = sizes["model.embed_tokens.weight"]
    assert others == rest - embedding + embedding // model.config.vocab_size


@pytest.mark.parametrize("input", ["normed", "residual"])
def test_masked_loss_is_that_of_neurons_left_out(model, trunk, collection, parts, tmp_path, input):
    predictors = build(model, collection, wanted(input=input, type="F16"), tmp_path)
    thresholds = predictors.at(0.9)
    exact, loss = report.loss_of(trunk, model, parts["report"], micro=4)
    got = loss(predictors, thresholds)
    assert got != exact
    assert measure.measure(trunk, parts["report"]).loss == exact  # hooks are gone
    # by hand: every MLP computes its own mask
    for layer, (mlp, decoder) in enumerate(zip(trunk.mlps, trunk.layers, strict=True)):
        seen = {}
        decoder.post_attention_layernorm.register_forward_pre_hook(
            lambda _, x, seen=seen: seen.update(residual=x[0].numpy())
        )

        def forward(x, mlp=mlp, layer=layer, seen=seen):
            weights = networks.weights_of(predictors, model, layer)
            given = x.numpy() if input == "normed" else seen["residual"]
            values = scores("lowrank", given.reshape(-1, 96), weights).reshape(*given.shape[:2], -1)
            gate = mlp.gate_proj(x)
            x1 = torch.where(gate < 0.5, 0.0, gate) * mlp.up_proj(x)
            return mlp.down_proj(x1 * torch.from_numpy(values >= thresholds[layer]))

        mlp.forward = forward
    tokens = torch.from_numpy(parts["report"].tokens)
    with torch.no_grad():
        hidden = trunk.hidden(tokens[:, :-1])
        logits = hidden @ trunk.head.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    for mlp, decoder in zip(trunk.mlps, trunk.layers, strict=True):
        del mlp.forward
        decoder.post_attention_layernorm._forward_pre_hooks.clear()
    assert got == pytest.approx(float(expected), abs=1e-3)


def test_a_threshold_below_all_scores_changes_nothing(model, trunk, collection, parts, tmp_path):
    predictors = build(model, collection, wanted("sketch", rank=None), tmp_path)
    exact, loss = report.loss_of(trunk, model, parts["report"])
    assert loss(predictors, np.full(2, -1e9, np.float32)) == pytest.approx(exact, abs=1e-6)
    assert loss(predictors, np.full(2, 1e9, np.float32)) != pytest.approx(exact, abs=1e-3)


def test_the_report_is_json_and_a_table(model, trunk, collection, parts, tmp_path):
    predictors = build(model, collection, wanted(), tmp_path)
    exact, loss = report.loss_of(trunk, model, parts["report"])
    found = {"lowrank": (predictors, report.points("lowrank", predictors, model, collection, loss=loss))}
    described = report.described(model, found, exact)
    again = json.loads(json.dumps(described, allow_nan=False))
    way = again["ways"]["lowrank"]
    assert way["ranks"] == [32, 32] and len(way["points"]) == len(RECALLS) + 1
    assert way["share_of_gate"] == pytest.approx(32 * (96 + 160) / (96 * 160))
    assert len(way["points"][0]["layer_recall"]) == 2
    lines = report.table(again).splitlines()
    assert len(lines) == 4 + len(RECALLS) + 1
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "average sparsity | predicted sparsity | activation recall" in lines[0]
    pytest.importorskip("matplotlib")
    from prosparse.predictor.plot import plot

    plot(again, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_networks_are_kept_by_layer(model, collection, tmp_path, monkeypatch):
    from prosparse.predictor import build as module

    whole = build(model, collection, wanted(), tmp_path / "a")
    real, calls, again = module.train_lowrank, [], []

    def fails_at_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2 and not again:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "train_lowrank", fails_at_second)
    with pytest.raises(KeyboardInterrupt):
        build(model, collection, wanted(), tmp_path / "b")
    calls.clear()
    again.append(build(model, collection, wanted(), tmp_path / "b"))
    assert len(calls) == 1
    assert again[0].thresholds == whole.thresholds
    for a, b in zip(again[0].networks, whole.networks, strict=True):
        assert all(np.array_equal(x.data, y.data) for x, y in zip(a, b, strict=True))
    # other types and recalls need no training, another seed does
    build(model, collection, wanted(type="Q4_0", recalls=(0.5, 0.97)), tmp_path / "b")
    assert len(calls) == 1
    build(model, collection, wanted(training=Training(1, epochs=1, seed=7)), tmp_path / "b")
    assert len(calls) == 3
    broken = next((tmp_path / "b").glob("lowrank-000-*.npz"))
    for path in (tmp_path / "b").glob("lowrank-000-*.npz"):
        path.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        build(model, collection, wanted(), tmp_path / "b")


@pytest.mark.parametrize("kind", ["normed", "residual"])
def test_importance_is_what_a_missed_neuron_takes_away(model, collection, kind):
    given = examples(model, collection, wanted(input=kind), 1)
    got = importance(model, given, kind, 1)
    weights = {
        part: model.tensors[f"model.layers.1.mlp.{part}_proj.weight"].dequantize()
        for part in ("gate", "up", "down")
    }
    x = np.asarray(collection.inputs(1, "normed", "train"), np.float32)
    gate = x @ weights["gate"].T
    x1 = np.where(gate >= 0.5, gate, 0) * (x @ weights["up"].T)
    cost = np.zeros(D_FF)
    for j in range(D_FF):
        lost = np.linalg.norm(np.outer(x1[:, j], weights["down"][:, j]), axis=1)
        cost[j] = lost[x1[:, j] != 0].mean() if (x1[:, j] != 0).any() else 0
    cost = np.maximum(cost, 1e-3 * cost.mean())
    # gates at the threshold may fall to either side of it
    np.testing.assert_allclose(got, cost / np.exp(np.log(cost).mean()), rtol=0.05)


def test_a_budget_is_kept(model, collection, tmp_path):
    given = wanted(rank=None, budget=1.2, type="Q4_0")
    got = build(model, collection, given, tmp_path)
    assert sum(networks.predictor_bytes(got, model)) <= 1.2 * sum(networks.gate_bytes(model))
    assert all(fc1.shape[0] % 32 == 0 for fc1, _ in got.networks)
    with pytest.raises(ValueError, match="one of them"):
        wanted(budget=0.5)
    with pytest.raises(ValueError, match="one of them"):
        wanted(rank=None)


def test_models_without_zeros_are_refused(tiny_model, collection, tmp_path):
    with pytest.raises(ValueError, match="prosparse sparsify"):
        build(tiny_model(), collection, wanted(), tmp_path)


def test_scores_that_are_nan_name_their_neuron(model, trunk, parts):
    broken = [np.full((32, 96), np.nan, np.float32), np.ones((D_FF, 32), np.float32)]
    pair = tuple(networks.stored(weight, "F32") for weight in broken)
    predictors = Predictors("lowrank", "normed", (0.9,), ((0.0,),) * 2, 0.9, (pair,) * 2)
    exact, loss = report.loss_of(trunk, model, parts["report"])
    assert loss(predictors, np.zeros(2, np.float32)) == pytest.approx(exact, abs=1e-6)


def test_speeds_say_why_there_are_none(model, tmp_path):
    from prosparse.formats.convert import write_model

    path = tmp_path / "m.gguf"
    write_model(path, model)
    got = report.speeds(path, [0.9], tokens=2, rounds=1)
    assert set(got) == {"note"}


def test_counts_do_not_hide_layers():
    a, b = metrics.Counts(100, 10, 20, 9), metrics.Counts(100, 20, 50, 10)
    point = report.Point("x", 0.9, (a, b), None, 0.0, 0.0)
    assert point.recall == pytest.approx((0.9 + 0.5) / 2)
    assert point.predicted_sparsity == pytest.approx((0.8 + 0.5) / 2)
    assert point.sparsity == pytest.approx((0.9 + 0.8) / 2)
    assert replace(point, asked=None).asked is None
