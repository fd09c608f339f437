"""Conversion: round trips of every type and architecture, options, refusals, and the verbs."""

import argparse
import json

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.formats import convert as convert_verb
from prosparse.formats import inspect as inspect_verb
from prosparse.formats import open_model
from prosparse.formats.convert import convert, write_model
from prosparse.formats.gguf import read_gguf
from prosparse.formats.open import deinterleave, interleave
from prosparse.formats.quants import NATIVE
from prosparse.model.activation import Activation
from prosparse.model.rope import RopeScaling

FLOATS = ("F32", "F16", "BF16")
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {"bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "minicpm": {"embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 6.0, "tied": True},
}


def save(model, folder):
    """The model as a GGUF file."""
    path = folder / "model.gguf"
    write_model(path, model)
    return path


def assert_same_weights(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert other.tensors[name].type == tensor.type, name
        assert np.array_equal(other.tensors[name].data, tensor.data), name


@pytest.mark.parametrize("kind", NATIVE)
def test_gguf_holds_every_native_type(tiny_model, tmp_path, kind):
    model = tiny_model(type=kind, hidden=64, intermediate=96)
    again = open_model(save(model, tmp_path))
    assert_same_weights(model, again)
    assert again.config == model.config and again.name == model.name
    assert again.tokenizer.source == "gguf"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", FLOATS)
def test_gguf_to_hf_to_gguf(tiny_model, tmp_path, architecture, kind):
    model = tiny_model(architecture, kind, act="fatrelu", act_param=0.03, **ARCHITECTURES[architecture])
    first = save(model, tmp_path)
    convert(first, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "second.gguf")
    for path in (first, tmp_path / "folder", tmp_path / "second.gguf"):
        again = open_model(path)
        assert_same_weights(model, again)
        assert again.config.activation == Activation("fatrelu", 0.03)
        assert again.config.sliding_window == model.config.sliding_window
    one, two = read_gguf(first), read_gguf(tmp_path / "second.gguf")
    assert one.metadata.keys() == two.metadata.keys()
    # the name is the file's or folder's, and HF knows no unused tokens
    for key in one.metadata.keys() - {"general.name", "tokenizer.ggml.token_type"}:
        assert np.array_equal(one.metadata[key], two.metadata[key]), key


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_form_has_the_same_logits(tiny_model, tmp_path, architecture):
    model = tiny_model(architecture, **ARCHITECTURES[architecture])
    tokens = list(range(10))
    expected = LLM(model, backend="naive").forward(tokens, all_logits=True)
    convert(save(model, tmp_path), tmp_path / "folder")
    for path in (tmp_path / "model.gguf", tmp_path / "folder"):
        logits = LLM(open_model(path), backend="naive").forward(tokens, all_logits=True)
        # a scale of MiniCPM may be rounded to float32 on the way
        assert np.allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("tied", [True, False])
def test_minicpm_folded(tiny_model, tmp_path, tied):
    model = tiny_model("minicpm", **ARCHITECTURES["minicpm"] | {"tied": tied})
    convert(save(model, tmp_path), tmp_path / "folded.gguf", fold=True)
    assert read_gguf(tmp_path / "folded.gguf").metadata["general.architecture"] == "llama"
    logits = [
        LLM(open_model(path), backend="naive").forward(list(range(10)))
        for path in (tmp_path / "model.gguf", tmp_path / "folded.gguf")
    ]
    assert np.allclose(*logits, rtol=0, atol=1e-5 * np.abs(logits[0]).max())


def test_folding_keeps_the_types(tiny_model, tmp_path):
    model = tiny_model("minicpm", "BF16", **ARCHITECTURES["minicpm"])
    folded = convert(save(model, tmp_path), tmp_path / "folded.gguf", fold=True)
    assert {t.type for t in folded.tensors.values() if len(t.shape) == 2} == {"BF16"}


def test_hf_rows_and_gguf_rows():
    rows = np.arange(16, dtype=np.uint8).reshape(16, 1)
    stored = interleave(rows, 2)
    # two heads of eight rows: row i of the first half stands beside row i of the second
    assert stored[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert np.array_equal(deinterleave(stored, 2), rows)


def test_transformers_computes_the_same(tiny_model, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = tiny_model("llama")
    convert(save(model, tmp_path), tmp_path / "folder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.arange(10)[None]).logits[0].numpy()
    logits = LLM(open_model(tmp_path / "model.gguf"), backend="naive").forward(
        list(range(10)), all_logits=True
    )
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


ROPES = {
    "linear": RopeScaling("linear", factor=4.0),
    "yarn": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=128),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=128),
}


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("pure", [False, True])
def test_types_of_a_quantised_file(tiny_model, tmp_path, kind, pure):
    convert(save(tiny_model(hidden=64, intermediate=96), tmp_path), tmp_path / "q.gguf", kind, pure=pure)
    tensors = open_model(tmp_path / "q.gguf").tensors
    small = kind in ("Q5_1", "Q4_1", "Q4_0")
    assert tensors["model.embed_tokens.weight"].type == ("Q8_0" if small and not pure else kind)
    assert tensors["lm_head.weight"].type == ("Q8_0" if small and not pure else kind)
    assert tensors["model.layers.1.mlp.down_proj.weight"].type == kind
    assert tensors["model.norm.weight"].type == "F32"


def test_quantised_files_become_f16_folders(tiny_model, tmp_path):
    model = tiny_model(type="Q8_0", hidden=64, intermediate=96)
    convert(save(model, tmp_path), tmp_path / "folder")
    name = "model.layers.0.mlp.up_proj.weight"
    again = open_model(tmp_path / "folder").tensors[name]
    assert again.type == "F16"
    assert np.allclose(again.dequantize(), model.tensors[name].dequantize(), rtol=1e-3)
    assert json.loads((tmp_path / "folder/config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("scaling", ROPES.values(), ids=ROPES)
def test_rope_scaling_survives(tiny_model, tmp_path, scaling):
    config = tiny_model(rope_scaling=scaling).config
    convert(save(tiny_model(rope_scaling=scaling), tmp_path), tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.gguf")
    for path in (tmp_path / "model.gguf", tmp_path / "folder", tmp_path / "again.gguf"):
        again = open_model(path).config
        assert np.allclose(again.inv_freq(), config.inv_freq(), rtol=1e-6, atol=0)
        assert again.rope_attention_factor() == pytest.approx(config.rope_attention_factor())


def test_refusals(tiny_model, tmp_path):
    source = save(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match=r"not q8_0; name a \.gguf file"):
        convert(source, tmp_path / "folder", "Q8_0")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(ValueError, match="new or empty place"):
        convert(source, tmp_path / "used")
    with pytest.raises(ValueError, match="multiple of 32"):
        convert(save(tiny_model(hidden=48, heads=4, kv=2), tmp_path), tmp_path / "q.gguf", "Q8_0")
    assert not (tmp_path / "q.gguf").exists()


def test_licence_and_authors_are_kept(tiny_model, tmp_path):
    kept = {"general.license": "apache-2.0", "general.languages": ["en", "fr"]}
    write_model(tmp_path / "model.gguf", tiny_model(), kept | {"general.file_type": 7})
    convert(tmp_path / "model.gguf", tmp_path / "again.gguf", "F16")
    metadata = read_gguf(tmp_path / "again.gguf").metadata
    assert metadata.items() >= (kept | {"general.file_type": 1}).items()


def test_onto_itself(tiny_model, tmp_path):
    model = tiny_model()
    path = save(model, tmp_path)
    convert(path, path, "F16")
    assert open_model(path).tensors["lm_head.weight"].type == "F16"


def run_verb(module, *args):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.main(parser.parse_args([str(arg) for arg in args]))


def test_verbs(tiny_model, tmp_path, capsys):
    source = save(tiny_model("minicpm", act="relu", **ARCHITECTURES["minicpm"]), tmp_path)
    assert run_verb(convert_verb, source, tmp_path / "q8.gguf", "--type", "q8_0", "--fold", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["size_bytes"] == open_model(tmp_path / "q8.gguf").size_bytes
    assert "llama.cpp ignores hidden_act relu" in err
    assert run_verb(inspect_verb, tmp_path / "q8.gguf", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["architecture"] == "llama"
    assert report["config"]["activation"] == {"name": "relu", "param": 0.0}
    assert report["types"].keys() == {"F32", "Q8_0"}
    assert report["metadata"]["tokenizer.ggml.tokens"] == "[288 values]"
    assert run_verb(inspect_verb, source, "--tensors") == 0
    text = capsys.readouterr().out
    assert "blk.1.ffn_down.weight" in text and "embedding_scale = 12" in text
    convert(source, tmp_path / "folder")
    assert run_verb(inspect_verb, tmp_path / "folder") == 0
    assert "HF folder" in capsys.readouterr().out


def test_inspect_shows_files_it_cannot_run(tmp_path, capsys):
    from prosparse.formats.gguf import write_gguf

    write_gguf(tmp_path / "m.gguf", {"general.architecture": "gemma"}, {})
    assert run_verb(inspect_verb, tmp_path / "m.gguf") == 0
    assert "cannot be run: " in capsys.readouterr().out
