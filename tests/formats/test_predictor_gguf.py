"""Predictors in our own files: every kind, type and architecture there and back, and what is refused."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.engine.naive import NaiveModel
from prosparse.formats import convert as convert_verb
from prosparse.formats import inspect as inspect_verb
from prosparse.formats import open_model
from prosparse.formats.convert import convert, write_model
from prosparse.formats.gguf import read_gguf, write_gguf
from prosparse.formats.safetensors import read_safetensors, write_safetensors
from prosparse.model.predictor import Predictors
from tiny import stored

ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {"bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "gemma": {},
    "minicpm": {"embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 6.0, "tied": True},
}
RECALLS = (0.9, 0.95, 0.99)
KINDS = ("lowrank", "sketch", "sign")


def predictors(config, kind="lowrank", type="F32", ranks=(32, 64), seed=1):
    """Random ones; thresholds are float32, as a calibration gives them."""
    rng = np.random.default_rng(seed)
    d, d_ff, networks = config.hidden_size, config.intermediate_size, ()
    if kind == "lowrank":
        networks = tuple(
            (
                stored(rng.standard_normal((r, d), np.float32) / np.float32(np.sqrt(d)), type),
                stored(rng.standard_normal((d_ff, r), np.float32) / np.float32(np.sqrt(r)), type),
            )
            for r in (ranks[i % len(ranks)] for i in range(config.num_hidden_layers))
        )
    falling = -np.sort(-rng.standard_normal((config.num_hidden_layers, 3)).astype(np.float32))
    return Predictors(
        kind=kind,
        input="residual" if kind == "lowrank" else "normed",
        recalls=RECALLS,
        thresholds=tuple(tuple(row) for row in falling.tolist()),
        default=0.95,
        networks=networks,
        sketch="Q4_0" if kind != "sketch" else "Q8_0",
    )


def with_predictors(model, **options):
    return replace(model, predictors=predictors(model.config, **options))


def assert_same(one, other):
    """Equal in every field, networks by type and byte."""
    for field in ("kind", "input", "recalls", "thresholds", "default", "sketch"):
        assert getattr(one, field) == getattr(other, field), field
    assert len(one.networks) == len(other.networks)
    for pair, again in zip(one.networks, other.networks, strict=True):
        for a, b in zip(pair, again, strict=True):
            assert (a.type, a.shape) == (b.type, b.shape) and np.array_equal(a.data, b.data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_to_hf_to_gguf(tiny_model, tmp_path, architecture, kind):
    model = tiny_model(architecture, act="fatrelu", act_param=0.03, **ARCHITECTURES[architecture])
    model = with_predictors(model, kind=kind)
    write_model(tmp_path / "m.gguf", model)
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.gguf")
    for name in ("m.gguf", "folder", "again.gguf"):
        assert_same(model.predictors, open_model(tmp_path / name).predictors)
    one, two = (read_gguf(tmp_path / name) for name in ("m.gguf", "again.gguf"))
    assert one.tensors.keys() == two.tensors.keys()
    assert ("blk.1.ffn_pred_2.weight" in one.tensors) == (kind == "lowrank")


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0"])
def test_every_type(tiny_model, tmp_path, type):
    model = with_predictors(tiny_model(act="relu"), type=type)
    write_model(tmp_path / "m.gguf", model)
    assert_same(model.predictors, open_model(tmp_path / "m.gguf").predictors)
    entry = read_gguf(tmp_path / "m.gguf").tensors["blk.1.ffn_pred_1.weight"]
    assert (entry.type, entry.shape) == (type, (64, 96))


def networks_types(path):
    return {tensor.type for pair in open_model(path).predictors.networks for tensor in pair}


def test_types_follow_those_of_the_matrices(tiny_model, tmp_path):
    write_model(tmp_path / "m.gguf", with_predictors(tiny_model(act="relu")))
    expected = {
        "F16": {"F16"},
        "Q8_0": {"Q8_0"},
        "Q4_0": {"Q8_0"},  # as embedding and output
    }
    for kind, types in expected.items():
        convert(tmp_path / "m.gguf", tmp_path / f"{kind}.gguf", kind)
        assert networks_types(tmp_path / f"{kind}.gguf") == types
    convert(tmp_path / "m.gguf", tmp_path / "pure.gguf", "Q4_0", pure=True)
    assert networks_types(tmp_path / "pure.gguf") == {"Q4_0"}
    convert(tmp_path / "Q8_0.gguf", tmp_path / "folder")
    assert networks_types(tmp_path / "folder") == {"F16"}
    write_model(tmp_path / "odd.gguf", with_predictors(tiny_model(act="relu"), ranks=(20,)))
    convert(tmp_path / "odd.gguf", tmp_path / "odd8.gguf", "Q8_0")
    first, second = open_model(tmp_path / "odd8.gguf").predictors.networks[0]
    assert (first.type, second.type) == ("Q8_0", "F16")  # 20 columns are no whole block


@pytest.mark.parametrize("kind", KINDS)
def test_folding_keeps_predictors_and_what_they_see(tiny_model, tmp_path, kind, monkeypatch):
    model = tiny_model("minicpm", act="fatrelu", act_param=0.1, **ARCHITECTURES["minicpm"])
    model = with_predictors(model, kind=kind)
    write_model(tmp_path / "m.gguf", model)
    convert(tmp_path / "m.gguf", tmp_path / "folded.gguf", fold=True)
    seen, norm = [], NaiveModel._norm

    def recorded(self, x, name):
        normed = norm(self, x, name)
        if "post_attention" in name:
            seen[-1] += [x, normed]
        return normed

    monkeypatch.setattr(NaiveModel, "_norm", recorded)
    for name in ("m.gguf", "folded.gguf"):
        assert_same(model.predictors, open_model(tmp_path / name).predictors)
        seen.append([])
        bare = replace(open_model(tmp_path / name), predictors=None)
        LLM(bare, backend="naive").forward(list(range(10)))
    assert len(seen[0]) == 4
    for one, other in zip(*seen, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_without(tiny_model, tmp_path, capsys):
    write_model(tmp_path / "m.gguf", with_predictors(tiny_model(act="relu")))
    assert run_verb(convert_verb, tmp_path / "m.gguf", tmp_path / "with.gguf") == 0
    assert "llama.cpp refuses files with predictors" in capsys.readouterr().err
    assert run_verb(convert_verb, tmp_path / "m.gguf", tmp_path / "bare.gguf", "--no-predictors") == 0
    assert "predictors" not in capsys.readouterr().err
    assert open_model(tmp_path / "bare.gguf").predictors is None
    bare = read_gguf(tmp_path / "bare.gguf")
    assert not any("predictor" in key for key in bare.metadata)
    assert not any("pred" in name for name in bare.tensors)


def run_verb(module, *args):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.main(parser.parse_args([str(arg) for arg in args]))


def test_inspect(tiny_model, tmp_path, capsys):
    model = with_predictors(tiny_model(act="relu"))
    write_model(tmp_path / "m.gguf", model)
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    for name in ("m.gguf", "folder"):
        assert run_verb(inspect_verb, tmp_path / name, "--json") == 0
        found = json.loads(capsys.readouterr().out)["predictors"]
        assert found["kind"] == "lowrank" and found["ranks"] == [32, 64] and found["default"] == 0.95
        assert found["bytes"] == 4 * (96 + 160) * (32 + 64)
        assert found["thresholds"] == [row[1] for row in model.predictors.thresholds]
        assert run_verb(inspect_verb, tmp_path / name, "--tensors") == 0
        text = capsys.readouterr().out
        assert "  kind = lowrank" in text and "[64, 96]" in text
    convert(tmp_path / "m.gguf", tmp_path / "bare.gguf", keep_predictors=False)
    assert run_verb(inspect_verb, tmp_path / "bare.gguf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["predictors"] is None


def test_recalls_that_32_bits_confuse(tiny_model, tmp_path):
    model = tiny_model(act="relu")
    close = replace(predictors(model.config, "sign"), recalls=(0.9, 0.95, 0.95 + 1e-12))
    with pytest.raises(ValueError, match="32 bits"):
        write_model(tmp_path / "m.gguf", replace(model, predictors=close))
    assert not (tmp_path / "m.gguf").exists()


PRED = "prosparse.predictor."
BAD_KEYS = {
    "kind": ("oracle", "unknown predictor 'oracle'"),
    "input": ("output", "input is residual or normed"),
    "recalls": (np.array([0.9, 0.9, 0.99], np.float32), "ascend"),
    "default": (0.5, "outside of the calibrated"),
    "thresholds": (np.array([1, 2, 3, 1, 2, 3], np.float32), "fall as recall rises"),
    "sketch": ("Q9_9", "sketch type 'Q9_9'"),
}


def edited(source, target, metadata=(), tensors=(), drop=()):
    file = read_gguf(source)
    keep = {k: v for k, v in (dict(file.metadata) | dict(metadata)).items() if k not in drop}
    held = {k: v for k, v in (dict(file.tensors) | dict(tensors)).items() if k not in drop}
    write_gguf(target, keep, held)


@pytest.fixture
def source(tiny_model, tmp_path):
    write_model(tmp_path / "m.gguf", with_predictors(tiny_model(act="relu")))
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys(source, tmp_path, key):
    value, message = BAD_KEYS[key]
    edited(source, tmp_path / "bad.gguf", {PRED + key: value})
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "bad.gguf")
    edited(source, tmp_path / "bad.gguf", drop=[PRED + key])
    with pytest.raises(ValueError, match=f"{PRED}{key} is missing"):
        open_model(tmp_path / "bad.gguf")
    for other in (7, True, "x", ["a"], np.array([1, 2], np.int32)):
        edited(source, tmp_path / "bad.gguf", {PRED + key: other})
        with pytest.raises(ValueError, match=r"bad\.gguf: "):
            open_model(tmp_path / "bad.gguf")


F32_MATRIX = stored(np.ones((32, 64), np.float32), "F32")
BAD_FILES = {
    "unknown key": ({PRED + "bias": 1.0}, {}, [], "predictor.bias is not known"),
    "too few": ({PRED + "thresholds": np.ones(5, np.float32)}, {}, [], "5 values, not one for each of 2"),
    "NaN": ({PRED + "thresholds": np.array([np.nan] * 6, np.float32)}, {}, [], "must be finite"),
    "infinite": ({PRED + "thresholds": np.array([np.inf] * 6, np.float32)}, {}, [], "must be finite"),
    "a layer": ({}, {}, ["blk.1.ffn_pred_1.weight"], r"blk\.1\.ffn_pred_1\.weight is missing"),
    "one half": ({}, {}, ["blk.0.ffn_pred_2.weight"], r"blk\.0\.ffn_pred_2\.weight is missing"),
    "another layer": ({}, {"blk.2.ffn_pred_1.weight": F32_MATRIX}, [], r"blk\.2\.ffn_pred_1\.weight is not"),
    "a shape": ({}, {"blk.0.ffn_pred_1.weight": F32_MATRIX}, [], "the predictor of layer 0"),
    "a vector": ({}, {"blk.0.ffn_pred_1.weight": stored(np.ones(64, np.float32), "F32")}, [], "a matrix is"),
    "no networks": ({}, {}, [f"blk.{i}.ffn_pred_{j}.weight" for i in (0, 1) for j in (1, 2)], "0 networks"),
    "no keys": ({}, {}, [PRED + k for k in BAD_KEYS], "kind is missing"),
    "sign with networks": ({PRED + "kind": "sign"}, {}, [], "has no networks"),
    "silu": ({"prosparse.hidden_act": "silu"}, {}, ["llama.hidden_activation"], "silu has no inactive"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(source, tmp_path, case):
    metadata, tensors, drop, message = BAD_FILES[case]
    edited(source, tmp_path / "bad.gguf", metadata, tensors, drop)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "bad.gguf")


def test_bad_folders(source, tmp_path):
    folder = tmp_path / "folder"
    convert(source, folder)
    good, networks = (folder / "predictors.json").read_text(), folder / "predictors.safetensors"
    values = json.loads(good)
    for changes, message in [
        ({"kind": "oracle"}, "unknown predictor"),
        ({"kind": ["lowrank"]}, "unknown predictor"),
        ({"bias": 0}, "nothing else"),
        ({"recalls": "all"}, "must be numbers"),
        ({"recalls": [0.9, True]}, "must be numbers"),
        ({"thresholds": [[3, 2, 1]]}, "1 layers|2 networks"),
        ({"thresholds": [[3, 2, float("nan")]] * 2}, "must be numbers"),
        ({"thresholds": 3}, "must be numbers"),
        ({"sketch": None}, "sketch type None"),
    ]:
        (folder / "predictors.json").write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match=message):
            open_model(folder)
    for text in ("", "[]", "{", "[" * 100_000):
        (folder / "predictors.json").write_text(text)
        with pytest.raises(ValueError, match=r"predictors\.json"):
            open_model(folder)
    (folder / "predictors.json").unlink()
    with pytest.raises(ValueError, match=r"predictors\.json is missing"):
        open_model(folder)
    (folder / "predictors.json").write_text(good)
    tensors = read_safetensors(networks)
    more = tensors | {"model.layers.9.fc1.weight": F32_MATRIX}
    for changed, message in [
        (more, r"layers\.9\.fc1\.weight is not part"),
        ({k: v for k, v in tensors.items() if k != "model.layers.1.fc2.weight"}, "fc2.weight is missing"),
    ]:
        networks.unlink()
        write_safetensors(networks, changed)
        with pytest.raises(ValueError, match=message):
            open_model(folder)
    networks.unlink()
    with pytest.raises(ValueError, match="0 networks"):
        open_model(folder)
