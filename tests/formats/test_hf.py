"""Hugging Face folders: what transformers saves, shards, and damaged folders."""

import json

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.formats import open_model
from prosparse.formats.convert import convert
from prosparse.formats.hf import read_folder, write_folder
from prosparse.formats.safetensors import read_safetensors, write_safetensors
from prosparse.model.model import Tensor
from prosparse.model.names import expected_tensors


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A sharded folder of a tiny tied model."""
    write_folder(tmp_path / "m", tiny_model(type="BF16", tied=True), "BF16", shard_bytes=50_000)
    return tmp_path / "m"


def test_shards(tiny_model, folder):
    model, again = tiny_model(type="BF16", tied=True), read_folder(folder)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == model.size_bytes
    assert again.config == model.config and again.name == "m"
    for name, tensor in model.tensors.items():
        assert np.array_equal(again.tensors[name].data, tensor.data)


@pytest.mark.parametrize(
    ("class_name", "more"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
        ("MistralForCausalLM", {"sliding_window": 64}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 32}),
        ("GemmaForCausalLM", {"head_dim": 32}),
        ("GemmaForCausalLM", {"head_dim": 16, "hidden_act": "relu"}),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves(tmp_path, class_name, more, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, class_name.replace("ForCausalLM", "Config"))(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    theirs = getattr(transformers, class_name)(config).eval()
    for name, values in theirs.named_parameters():
        if name.endswith("norm.weight"):  # they are all alike in new models
            torch.nn.init.normal_(values, values.mean().item(), 0.2)
    theirs.save_pretrained(tmp_path)
    if class_name == "GemmaForCausalLM" and not tied:
        with pytest.raises(ValueError, match="tie_word_embeddings must be true for gemma"):
            open_model(tmp_path)
        return
    model = open_model(tmp_path)
    assert model.tokenizer.source == "none"
    tokens = list(range(20))
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    logits = LLM(model, backend="naive").forward(tokens, all_logits=True)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_norms_of_gemma_keep_their_bits(tiny_model, tmp_path):
    """transformers stores them less 1, and 1 + w - 1 is not w for small w; GGUF has what multiplies."""
    rng = np.random.default_rng(0)
    stored = rng.standard_normal(96, np.float32) * np.float32(10) ** rng.integers(-12, 3, 96, np.int32)
    stored = stored.astype(np.float32)
    model = tiny_model("gemma", act="gelu", head_dim=32)
    write_folder(tmp_path / "a", model, "F32")
    file = tmp_path / "a" / "model.safetensors"
    tensors = {name: Tensor(t.type, t.shape, t.data.copy()) for name, t in read_safetensors(file).items()}
    write_safetensors(file, tensors | {"model.norm.weight": Tensor("F32", (96,), stored.view(np.uint8))})
    first = read_folder(tmp_path / "a")
    assert np.array_equal(first.tensors["model.norm.weight"].dequantize(), 1 + stored)

    convert(tmp_path / "a", tmp_path / "b")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    # a GGUF file holds 1 + w, whose own way to a folder and back is exact
    convert(tmp_path / "a", tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "c.gguf")
    for path in ("a.gguf", "c", "c.gguf"):
        again = open_model(tmp_path / path)
        assert again.config == model.config
        for name, tensor in first.tensors.items():
            assert np.array_equal(again.tensors[name].data, tensor.data), (path, name)


def test_end_tokens_of_both_files(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 257], "bos_token_id": 256}')
    assert read_folder(folder).config.eos_token_ids == (257, 7)


def test_matrices_are_views_and_vectors_are_widened(folder):
    tensors = read_folder(folder).tensors
    matrix = tensors["model.embed_tokens.weight"].data
    assert not matrix.flags.owndata and not matrix.flags.writeable
    assert tensors["model.norm.weight"].type == "F32"


def rewrite(folder, **tensors):
    """Replace the folder's weights by one file with some tensors changed, or left out for None."""
    kept = dict(read_folder(folder).tensors) | {name.replace("__", "."): t for name, t in tensors.items()}
    (folder / "model.safetensors.index.json").unlink()
    write_safetensors(folder / "model.safetensors", {n: t for n, t in kept.items() if t is not None})


def test_redundant_tensors_are_dropped(folder):
    embedding = read_folder(folder).tensors["model.embed_tokens.weight"]
    frequencies = Tensor("F32", (12,), np.zeros(48, np.uint8))
    rewrite(
        folder,
        lm_head__weight=embedding,
        model__layers__0__self_attn__rotary_emb__inv_freq=frequencies,
    )
    assert read_folder(folder).tensors.keys() == set(expected_tensors(read_folder(folder).config))


def test_a_tied_head_that_differs_is_refused(folder):
    head = Tensor("BF16", (288, 96), np.zeros((288, 192), np.uint8))
    rewrite(folder, lm_head__weight=head)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"tensor model\.norm\.weight is missing"),
        ({"model__norm__weight": Tensor("F32", (95,), np.zeros(380, np.uint8))}, r"has shape \(95,\)"),
        ({"model__norm__weight": Tensor("F32", (96,), np.full(384, 255, np.uint8))}, "NaN or infinite"),
        ({"extra": Tensor("F32", (96,), np.zeros(384, np.uint8))}, "tensor extra is not part"),
    ],
)
def test_wrong_tensors_are_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_folder(folder)
    assert str(error.value).startswith(str(folder))


def test_damaged_folders(folder):
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    places = json.loads(good)["weight_map"]
    first = min(places.values())
    for weight_map, message in (
        (None, "weight_map must give"),
        ({"a": 1}, "weight_map must give"),
        ({"a": "../m.safetensors"}, "is not in the folder"),
        ({"a": "missing.safetensors"}, "is not in the folder"),
        (places | {"ghost.weight": first}, r"tensor ghost\.weight is not in"),
        (places | {"model.embed_tokens.weight": max(places.values())}, "is not in model-"),
        (places | {"model.norm.weight": first}, "not where the index says"),
    ):
        edit_json(index, weight_map=weight_map)
        with pytest.raises(ValueError, match=message):
            read_folder(folder)
    index.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        read_folder(folder)
    index.write_text(good)
    edit_json(folder / "config.json", hidden_act="mish")
    with pytest.raises(ValueError, match=r"m: unknown activation 'mish'"):
        read_folder(folder)
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 10**5, "not valid JSON"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            read_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: this file is missing"):
        read_folder(folder)
