"""Runs that start where others ended, with all weights or with adapters."""

import json

import numpy as np
import pytest
from command import arguments

from prosparse import cli
from prosparse.formats import open_model
from prosparse.model.fold import fold_thresholds, unfold_thresholds

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def leg(folders):
    """One leg: its model, and its metrics."""
    for package in ("torch", "transformers"):
        pytest.importorskip(package)

    def run(name: str, *options: str):
        out = folders / name
        assert cli.main([*arguments(folders, "--type", "f32", *options), "--out", str(out)]) == 0
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return open_model(out / "model"), metrics

    return run


def test_a_leg_goes_on_where_the_last_one_stopped(leg, folders):
    first, metrics = leg("first", "--target", "0.8", "--reach", "0.5", "--keep-embeddings", "--states", "0.5")
    original = open_model(folders / "tiny")
    np.testing.assert_array_equal(
        first.tensors[EMBEDDING].dequantize(), original.tensors[EMBEDDING].dequantize()
    )
    assert all(line["states"] > 0 for line in metrics)
    middle = len(metrics) // 2
    assert metrics[middle]["wanted"] == pytest.approx(0.8)
    last = metrics[-1]
    # as it is handed on: a file of fewer bits
    file = folders / "first.gguf"
    assert cli.main(["convert", str(folders / "first" / "model"), str(file), "--type", "q8_0"]) == 0
    second, metrics = leg("second", "--from", str(file), "--target", "0.85", "--lr-floor", "1")
    assert metrics[0]["sparsity"] == pytest.approx(last["sparsity"], abs=0.05)
    assert metrics[0]["kl"] < 2 * last["kl"] + 0.1
    assert [line["wanted"] is None for line in metrics] == [True] + [False] * (len(metrics) - 1)
    assert metrics[-1]["sparsity"] == pytest.approx(0.85, abs=0.04)
    assert metrics[-1]["lr"] == metrics[20]["lr"] == 3e-3
    assert not np.array_equal(second.tensors[EMBEDDING].dequantize(), first.tensors[EMBEDDING].dequantize())


def test_adapters_start_at_what_training_added(leg, folders):
    pytest.importorskip("peft")
    leg("first", "--target", "0.8", "--keep-embeddings")
    first = str(folders / "first" / "model")
    # of full rank they are all of it
    adapted, metrics = leg("same", "--from", first, "--target", "0.8", "--lora", "96:96", "--tokens", "128")
    before, metrics_of_all = leg("all", "--from", first, "--target", "0.8", "--tokens", "128")
    assert metrics[0]["kl"] == pytest.approx(metrics_of_all[0]["kl"], rel=1e-3)
    assert metrics[0]["sparsity"] == pytest.approx(metrics_of_all[0]["sparsity"], abs=1e-3)
    assert adapted.config.activation.name == before.config.activation.name == "fatrelu"
    # of a low one the nearest there is
    options = ["--target", "0.8", "--lora", "8:2", "--tokens", "128", "--lr", "1e-9"]
    low, _ = leg("low", "--from", first, *options)
    original = open_model(folders / "tiny")
    low, _ = unfold_thresholds(low, original)
    trained, _ = unfold_thresholds(open_model(first), original)
    for part, rank in (("mlp.up_proj", 8), ("self_attn.o_proj", 2)):
        name = f"model.layers.1.{part}.weight"
        base = original.tensors[name].dequantize()
        s = np.linalg.svd(low.tensors[name].dequantize() - base, compute_uv=False)
        # unfolding is not exact to the last bit
        expected = np.linalg.svd(trained.tensors[name].dequantize() - base, compute_uv=False)
        np.testing.assert_allclose(s[:rank], expected[:rank], rtol=0.05)
        assert s[rank] < 0.1 * s[0]


def test_the_papers_path_for_any_model(leg):
    model, metrics = leg("l1", "--l1", "0.01,0.1,0.5")
    assert model.config.activation.name == "relu"
    steps = len(metrics)
    assert metrics[0]["lambda"] == 0
    assert metrics[steps // 4]["lambda"] == pytest.approx(0.01)
    assert metrics[-1]["lambda"] == pytest.approx(0.5)


def test_stores_are_sources(leg, folders, capsys):
    _, metrics = leg("text")
    (store,) = (folders / "text" / "tokens").iterdir()
    _, again = leg("store", "--data", str(store))
    # the text twice: by weight of two equal sources
    assert again[0]["tokens"] == metrics[0]["tokens"]
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps(meta | {"tokenizer": "another"}))
    assert cli.main([*arguments(folders, "--data", str(store)), "--out", str(folders / "x")]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    (store / "meta.json").write_text("{}")
    assert cli.main([*arguments(folders, "--data", str(store)), "--out", str(folders / "x")]) == 2
    assert "damaged store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "nowhere"], "nowhere"),
        (["--l1", "a,b"], "factors of the stages"),
        (["--l1", "1e-3", "--reach", "0.5"], "--reach is for --target"),
        (["--l1", "1e-3", "--tokens", "128"], "too few"),
        (["--lora", "8:x"], "80:32"),
        (["--lora", "8:0"], "at least 1"),
        (["--states", "-1"], "must not be negative"),
    ],
)
def test_wrong_legs(folders, capsys, options, message):
    pytest.importorskip("torch")
    assert cli.main(arguments(folders, *options)) == 2
    assert message in capsys.readouterr().err


def test_another_models_leg_is_refused(folders, tiny_model, capsys):
    pytest.importorskip("torch")
    from prosparse.formats.hf import write_folder

    write_folder(folders / "wide", tiny_model(intermediate=320), "F32")
    assert cli.main(arguments(folders, "--from", str(folders / "wide"))) == 2
    assert "another shape" in capsys.readouterr().err


def test_thresholds_unfold(tiny_model):
    model = tiny_model(intermediate=256)
    folded = fold_thresholds(model, [0.3, 1.2], 0.6)
    again, thresholds = unfold_thresholds(folded, model)
    np.testing.assert_allclose(thresholds, [0.3, 1.2], rtol=1e-5)
    for name, tensor in model.tensors.items():
        np.testing.assert_allclose(again.tensors[name].dequantize(), tensor.dequantize(), rtol=1e-5)
    for name in list(folded.tensors):
        if "gate" in name:
            folded.tensors[name] = folded.tensors[EMBEDDING]
    with pytest.raises(ValueError):
        unfold_thresholds(folded, model)


def test_thresholds_are_never_dropped(folders, tiny_model, capsys):
    """A FATReLU model trained on as ReLU would be another model."""
    pytest.importorskip("torch")
    from dataclasses import replace

    from prosparse.formats.hf import write_folder
    from prosparse.model.activation import Activation

    for name, way, message in (
        ("fatrelu", ["--l1", "1e-3"], "only --target"),
        ("shiftrelu", [], "takes fatrelu and relu"),
    ):
        model = tiny_model(intermediate=256)
        model = replace(model, config=replace(model.config, activation=Activation(name, 0.1)))
        write_folder(folders / name, model, "F32")
        assert cli.main(arguments(folders, "--from", str(folders / name), *way)) == 2
        assert message in capsys.readouterr().err
