"""Adapters: extraction, the file, merging, and every way in which a file or a base may be wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from prosparse.cli import main
from prosparse.formats import adapter as files
from prosparse.formats import open_model
from prosparse.formats.convert import convert, write_model
from prosparse.formats.gguf import read_gguf, write_gguf
from prosparse.model.activation import Activation
from prosparse.model.adapter import ATTENTION, FFN, apply, change, extract, fingerprint, kept, kind_of
from prosparse.model.model import Model, float32

RANK = 6
GATE, KEYS = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.k_proj.weight"


def tuned_by(change, base, rng):
    """`base` with change(kind, values) in place of each matrix, other norms, and FATReLU."""
    tensors = {}
    for name, tensor in base.tensors.items():
        values = tensor.dequantize()
        if values.ndim == 1:
            values = values + 0.1 * rng.standard_normal(len(values))
        elif name not in ("model.embed_tokens.weight", "lm_head.weight"):
            values = change(kind_of(name), values)
        tensors[name] = float32(values)
    config = replace(base.config, activation=Activation("fatrelu", 0.25))
    return Model(config, tensors, base.tokenizer, "tuned")


def tune(base, rank, seed=1, scales=None):
    """`base` with a random change of this rank in each matrix."""
    rng = np.random.default_rng(seed)

    def change(kind, values):
        left, right = (rng.standard_normal((size, rank)) for size in values.shape)
        return (scales or {}).get(kind, 1) * values + 0.02 * left @ right.T / np.sqrt(rank)

    return tuned_by(change, base, rng)


@pytest.fixture
def base(tiny_model):
    return tiny_model(type="Q4_1", hidden=64, intermediate=96, tied=True)


@pytest.fixture
def tuned(base):
    return tune(base, RANK)


@pytest.fixture
def path(base, tuned, tmp_path):
    """An adapter file with factors in Q8_0."""
    files.write(tmp_path / "a.gguf", files.with_types(extract(base, tuned, RANK), "Q8_0"))
    return tmp_path / "a.gguf"


def distance(one, other):
    """Of the weights of two models that an adapter changes, relative to the second's change."""
    pairs = [(one.tensors[n].dequantize(), t.dequantize()) for n, t in other.tensors.items()]
    return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs))


def merged_naively(base, adapter, name):
    """The definition, in loops over single ranks and in float64."""
    factors = adapter.matrices[name]
    a, b = factors.a.dequantize().astype(float), factors.b.dequantize().astype(float)
    result = factors.scale * base.tensors[name].dequantize().astype(float)
    for k in range(len(a)):
        for row in range(len(result)):
            result[row] += factors.gain * b[k, row] * a[k]
    return result


def test_a_change_of_low_rank_is_found_exactly(base, tuned):
    made = extract(base, tuned, RANK)
    again = apply(base, made)
    assert again.config == tuned.config and again.name == "tuned"
    assert distance(again, tuned) < 1e-4 * distance(base, tuned)
    for factors in made.matrices.values():
        assert factors.scale == pytest.approx(1, abs=1e-5)
    assert again.tensors["model.embed_tokens.weight"] is base.tensors["model.embed_tokens.weight"]
    assert all(share == pytest.approx(1, abs=1e-6) for share in kept(base, tuned, made).values())


def test_scaled_matrices_keep_their_low_rank(base):
    # as folded thresholds and weight decay leave them
    scales = {"gate_proj": 2.5, "up_proj": 0.4, "q_proj": 0.94}
    tuned = tune(base, RANK, scales=scales)
    made = extract(base, tuned, RANK)
    for name, factors in made.matrices.items():
        assert factors.scale == pytest.approx(scales.get(kind_of(name), 1), abs=1e-4), name
    assert distance(apply(base, made), tuned) < 1e-3 * distance(base, tuned)


@pytest.mark.parametrize(("kind", "loss"), [("Q8_0", 0.01), ("Q5_1", 0.08), ("Q4_0", 0.2), ("F16", 1e-3)])
def test_a_type_loses_its_rounding_only(base, tuned, kind, loss):
    made = files.with_types(extract(base, tuned, RANK), kind)
    assert distance(apply(base, made), tuned) < loss * distance(base, tuned)


def test_merging_against_the_naive_twin(base, tuned, path):
    made = files.read(path)
    merged = apply(base, made)
    for name in made.matrices:
        expected = merged_naively(base, made, name)
        assert np.abs(merged.tensors[name].dequantize() - expected).max() < 1e-6, name


def test_a_small_rank_keeps_the_greatest_singular_values(base, tuned):
    made = extract(base, tuned, 2)
    difference = (
        tuned.tensors[GATE].dequantize() - made.matrices[GATE].scale * base.tensors[GATE].dequantize()
    )
    u, s, v = np.linalg.svd(difference)
    added = apply(base, made).tensors[GATE].dequantize() - (
        made.matrices[GATE].scale * base.tensors[GATE].dequantize()
    )
    assert np.allclose(added, u[:, :2] * s[:2] @ v[:2], atol=1e-5)
    assert kept(base, tuned, made)["gate_proj"] < 0.9


def test_ranks_by_kind_and_beyond_the_matrix(base, tuned):
    made = extract(base, tuned, dict.fromkeys(FFN, 1000) | dict.fromkeys(ATTENTION, 3))
    assert made.matrices[GATE].a.shape == (64, 64) and made.matrices[GATE].b.shape == (64, 96)
    assert made.matrices[KEYS].a.shape == (3, 64) and made.matrices[KEYS].b.shape == (3, 32)
    for ranks in (0, {"up_proj": 3}, dict.fromkeys((*FFN, *ATTENTION), -1)):
        with pytest.raises(ValueError, match="ranks of at least 1 are needed"):
            extract(base, tuned, ranks)


def test_nothing_changed(base, tmp_path):
    files.write(tmp_path / "a.gguf", files.with_types(extract(base, base, 4), "Q8_0"))
    merged = apply(base, files.read(tmp_path / "a.gguf"))
    assert distance(merged, base) < 1e-5
    assert change(base, base) == 0


def test_the_change_of_the_embedding(base, tuned):
    name = "model.embed_tokens.weight"
    larger = replace(
        tuned, tensors=dict(tuned.tensors) | {name: float32(1.5 * base.tensors[name].dequantize())}
    )
    assert change(base, larger) == pytest.approx(0.5)


def test_biases_and_head_norms(tiny_model, tmp_path):
    for architecture, options in {"qwen2": {"bias": True}, "qwen3": {"qk_norm": True}}.items():
        base = tiny_model(architecture, **options)
        tuned = tune(base, RANK)
        files.write(tmp_path / "a.gguf", extract(base, tuned, RANK))
        merged = apply(base, files.read(tmp_path / "a.gguf"))
        assert distance(merged, tuned) < 1e-4 * distance(base, tuned)


def test_the_file_holds_everything(base, tuned, tmp_path):
    measured = {"ppl": 12.5, "tasks": {"piqa": 0.6}}
    made = replace(
        files.with_types(extract(base, tuned, RANK), "Q5_1"),
        name="Käse, 90 %",
        license="Apache-2.0",
        measured=measured,
    )
    files.write(tmp_path / "a.gguf", made)
    again = files.read(tmp_path / "a.gguf")
    assert (again.name, again.license, again.measured) == (made.name, made.license, measured)
    assert (again.base, again.activation) == (fingerprint(base.tensors), Activation("fatrelu", 0.25))
    assert again.vectors.keys() == made.vectors.keys() and again.size_bytes == made.size_bytes
    for name, factors in made.matrices.items():
        assert (again.matrices[name].scale, again.matrices[name].gain) == (factors.scale, factors.gain)
        assert np.array_equal(again.matrices[name].a.data, factors.a.data)
        assert np.array_equal(again.matrices[name].b.data, factors.b.data)
    first = (tmp_path / "a.gguf").read_bytes()
    files.write(tmp_path / "b.gguf", again)
    assert (tmp_path / "b.gguf").read_bytes() == first


def test_keys_stand_for_what_is_made(base, tuned, path, tmp_path):
    files.write(tmp_path / "same.gguf", files.read(path))
    files.write(tmp_path / "other.gguf", extract(base, tuned, RANK - 1))
    assert files.key(tmp_path / "same.gguf") == files.key(path) != files.key(tmp_path / "other.gguf")


def test_another_base_is_refused(tiny_model, base, path):
    made = files.read(path)
    for other in (
        tiny_model(type="Q4_1", hidden=64, intermediate=96, tied=True, seed=1),
        tiny_model(type="Q8_0", hidden=64, intermediate=96, tied=True),
    ):
        with pytest.raises(ValueError, match=r"fingerprint .* give the file that it was made from"):
            apply(other, made)
    with pytest.raises(ValueError, match=r"another model .*gate_proj.* \(96, 64\) there, \(128, 64\) here"):
        apply(tiny_model(hidden=64, intermediate=128), made)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.2\.\S+ has shape none there"):
        apply(tiny_model(type="Q4_1", hidden=64, intermediate=96, tied=True, layers=3), made)


def test_what_cannot_be_extracted(tiny_model, base, tuned):
    with pytest.raises(ValueError, match="intermediate_size is 96 in tuned and 128 in"):
        extract(tiny_model(hidden=64, intermediate=128, tied=True), tuned, 4)
    with pytest.raises(ValueError, match="rope_theta"):
        extract(base, replace(tuned, config=replace(tuned.config, rope_theta=5e5)), 4)
    extract(base, replace(tuned, config=replace(tuned.config, eos_token_ids=(3, 257))), 4)


def test_nan_is_not_extracted(base, tuned):
    bad = tuned.tensors[GATE].dequantize()
    bad[3, 3] = np.nan
    with pytest.raises(ValueError, match=r"gate_proj.*NaN"):
        extract(base, replace(tuned, tensors=dict(tuned.tensors) | {GATE: float32(bad)}), 4)


def rewritten(path, keys, tensors):
    """The file with other metadata and tensors (None: without), its checksum right."""
    file = read_gguf(path)
    stored = {n: t for n, t in (dict(file.tensors) | tensors).items() if t is not None}
    keys = {"prosparse.adapter.sha256": fingerprint(stored)} | keys
    metadata = {k: v for k, v in (dict(file.metadata) | keys).items() if v is not None}
    write_gguf(path.with_name("bad.gguf"), metadata, stored)
    return path.with_name("bad.gguf")


STEM = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"general.architecture": "llama"}, {}, "no adapter: prosparse convert"),
        ({"prosparse.adapter.version": 3}, {}, "adapter format 3, and this prosparse knows 2"),
        ({"prosparse.adapter.version": None}, {}, "adapter format None"),
        ({"prosparse.adapter.base": None}, {}, r"key prosparse\.adapter\.base is missing"),
        ({"prosparse.extra": 1}, {}, r"key prosparse\.extra is unknown"),
        ({"prosparse.hidden_act_param": "1"}, {}, r"hidden_act_param is '1', not a float"),
        ({"prosparse.hidden_act": "mish"}, {}, "unknown activation 'mish'"),
        ({"prosparse.adapter.measured": "{"}, {}, "measured is not JSON"),
        ({"prosparse.adapter.measured": "[]"}, {}, "measured is not a JSON object"),
        ({"prosparse.adapter.sha256": "0"}, {}, "damaged"),
        ({}, {f"{STEM}.A": None}, rf"tensor {STEM}\.A is missing"),
        ({}, {f"{STEM}.scales": None}, rf"tensor {STEM}\.[AB] .* is no part of an adapter"),
        ({}, {f"{STEM}.scales": float32(np.ones(3))}, "scales must be 2 F32"),
        ({}, {f"{STEM}.scales": float32(np.array([1, np.inf]))}, "NaN or infinite"),
        ({}, {f"{STEM}.A": float32(np.ones((5, 64)))}, "not of one rank"),
        ({}, {f"{STEM}.A": float32(np.full((6, 64), np.nan))}, rf"tensor {STEM}\.A: NaN"),
        ({}, {"model.norm.weight": float32(np.full(64, np.nan))}, r"tensor model\.norm\.weight: NaN"),
        ({}, {"model.norm.weight": float32(np.ones((64, 1)))}, "no part of an adapter"),
    ],
)
def test_bad_files(path, keys, tensors, message):
    bad = rewritten(path, keys, tensors)
    with pytest.raises(ValueError, match=message) as error:
        files.read(bad)
    assert str(error.value).startswith(str(bad))


@pytest.mark.parametrize("tensors", [{"model.norm.weight": None}, {"extra.weight": float32(np.ones(3))}])
def test_tensors_that_do_not_fit_the_base(base, path, tensors):
    made = files.read(rewritten(path, {}, tensors))
    with pytest.raises(ValueError, match=f"tensor {next(iter(tensors))}"):
        apply(base, made)


def test_damage_and_truncation(path):
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            files.read(path)
    place = len(whole) - 200
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="damaged"):
        files.read(path)


def test_it_is_no_model(path):
    with pytest.raises(ValueError, match="an adapter, no model: prosparse convert BASE"):
        open_model(path)
    assert main(["inspect", str(path), "--json"]) == 0


@pytest.mark.parametrize("kind", [None, "bf16", "q4_0"])
def test_the_verb(base, tuned, tmp_path, capsys, kind):
    for model, name in ((base, "base"), (tuned, "tuned")):
        write_model(tmp_path / f"{name}.gguf", model, {"general.license": "mit"})
    (tmp_path / "m.json").write_text('{"ppl": 3}')
    paths = [str(tmp_path / name) for name in ("tuned.gguf", "a.gguf")]
    command = ["convert", *paths, "--base", str(tmp_path / "base.gguf"), "--rank", f"{RANK}:{RANK}"]
    assert main([*command, "--name", "N", "--measured", str(tmp_path / "m.json"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert min(result["kept"].values()) > 0.999
    made = files.read(tmp_path / "a.gguf")
    assert (made.name, made.license, made.measured) == ("N", "mit", {"ppl": 3})
    assert made.matrices[GATE].a.type == "Q8_0"

    command = ["convert", str(tmp_path / "base.gguf"), str(tmp_path / "out.gguf"), "--adapter", paths[1]]
    assert main(command + (["--type", kind] if kind else [])) == 0
    merged = open_model(tmp_path / "out.gguf")
    assert merged.config == tuned.config and merged.name == "N"
    assert merged.tensors[GATE].type == (kind or "q8_0").upper()
    # a type that is not asked for does not change what the adapter leaves alone
    assert kind or merged.tensors["model.embed_tokens.weight"].type == "Q4_1"
    assert distance(merged, tuned) < (0.3 if kind != "q4_0" else 5) * distance(base, tuned)


def test_merged_into_a_folder(base, tuned, path, tmp_path):
    write_model(tmp_path / "base.gguf", base)
    convert(tmp_path / "base.gguf", tmp_path / "folder", "F32", adapter=path)
    merged = open_model(tmp_path / "folder")
    assert merged.config.activation == tuned.config.activation
    assert distance(merged, tuned) < 0.01 * distance(base, tuned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "3"], "--rank is of an adapter to be written: add --base"),
        (["--base", "BASE", "--rank", "many"], "ranks are a number"),
        (["--base", "BASE", "--rank", "8:"], "ranks are a number"),
        (["--base", "BASE", "--fold"], "leave --adapter, --fold and --pure out"),
        (["--base", "BASE", "--measured", "BASE"], "not valid JSON"),
        (["--base", "BASE", "--powerinfer"], "do not go with --powerinfer"),
        (["--adapter", "BASE"], "this is no adapter"),
    ],
)
def test_options_that_do_not_fit(base, tmp_path, capsys, options, message):
    write_model(tmp_path / "base.gguf", base)
    options = [str(tmp_path / "base.gguf") if option == "BASE" else option for option in options]
    assert main(["convert", str(tmp_path / "base.gguf"), str(tmp_path / "out.gguf"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()
