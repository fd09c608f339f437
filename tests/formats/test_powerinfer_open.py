"""PowerInfer's model files read back: ours, those of others, MiniCPM-S-1B's twin, bad and mutated ones."""

import logging
import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import powerinfer_reader
import pytest
from fuzz_gguf import fields, mutate, open_bytes
from powerinfer_cases import SCALES, make, matrix, published, spm_tokenizer, written

from prosparse.engine.engine import LLM
from prosparse.engine.sampler import SamplingParams
from prosparse.formats import open_model
from prosparse.formats.convert import convert, write_model
from prosparse.formats.convert_powerinfer import convert_for_powerinfer
from prosparse.formats.gguf import parse, read_gguf, write_gguf
from prosparse.formats.open import model_from_gguf
from prosparse.formats.powerinfer import prepare
from prosparse.formats.powerinfer_open import RECALL_AS_PUBLISHED
from prosparse.model.activation import Activation
from prosparse.model.chat import MINICPM
from prosparse.model.model import Model, Tensor
from prosparse.model.names import expected_tensors
from prosparse.model.predictor import Predictors
from tiny import stored

GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", ["llama", "minicpm"])
def test_the_second_reader_and_the_engine_compute_the_same(tmp_path, architecture, kind):
    """PowerInfer's mathematics on the file, against predicted mode on the model that comes back."""
    model = make(architecture, thresholds=(-0.6, -1.2), **(SCALES if architecture == "minicpm" else {}))
    keys, tensors, path = written(model, tmp_path, kind)
    tokens = [256, 5, 99, 7, 211, 42]
    theirs, named = powerinfer_reader.forward(keys, tensors, tokens)
    assert 0.05 < named.mean() < 0.95
    again = open_model(path)
    assert again.config == model.config
    llm = LLM(again, mode="predicted", backend="naive")
    cache = llm.new_cache()
    ours = np.concatenate([llm.forward([token], cache) for token in tokens])
    # a score may stand on its threshold
    assert abs(llm.stats()["candidates"] - named.sum()) <= (5 if architecture == "minicpm" else 0)
    # what was folded is divided again, and down of Q4_0 becomes F16: both round
    rounded = 2e-3 if kind != "F32" or architecture == "minicpm" else 1e-3
    if kind in ("Q8_0", "Q4_0") and architecture == "minicpm":
        rounded = 0.03
    assert np.abs(ours - theirs).max() <= rounded * np.abs(theirs).max()


def test_dense_by_threshold_is_dense(tmp_path):
    """-1e9, PowerInfer's way to take every neuron."""
    model = make()
    keys, tensors, _ = written(model, tmp_path, "F32")
    theirs, named = powerinfer_reader.forward(keys, tensors, [256, 5, 99], threshold=-1e9)
    assert named.all()
    ours = LLM(model, mode="dense", backend="naive").forward([256, 5, 99], all_logits=True)
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


def restored_alike(model, again, tolerance):
    assert again.config == model.config
    assert again.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        one, other = tensor.dequantize(), again.tensors[name].dequantize()
        assert np.abs(one - other).max() <= tolerance * np.abs(one).max(), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "minicpm"])
def test_reading_back_restores_everything(tmp_path, architecture, tied):
    scales = SCALES | {"residual_scale": 1.4 / np.sqrt(2)} if architecture == "minicpm" else {}
    scales = {name: float(str(np.float32(value))) for name, value in scales.items()}
    model = make(architecture, "F16", act="fatrelu", act_param=0.03, tied=tied, **scales)
    source = tmp_path / "source.gguf"
    write_model(source, model, {"general.license": "apache-2.0"})
    _, notes = convert_for_powerinfer(source, tmp_path / "m.gguf", as_relu=True)
    assert "`prosparse perplexity -m SRC" in notes[0]
    again = open_model(tmp_path / "m.gguf")
    restored_alike(model, again, 1e-3)
    assert again.config.activation == Activation("fatrelu", 0.03)
    assert again.tokenizer.gguf.keys() == model.tokenizer.gguf.keys() and again.name == model.name
    assert read_gguf(tmp_path / "m.gguf").metadata["general.license"] == "apache-2.0"
    found = again.predictors
    assert (found.kind, found.input, found.recalls, found.default) == (
        "lowrank",
        "residual",
        (0.9, 0.95, 0.99),
        0.95,
    )
    # into our own form, and once more into theirs
    convert(tmp_path / "m.gguf", tmp_path / "ours.gguf")
    convert_for_powerinfer(tmp_path / "ours.gguf", tmp_path / "second.gguf", as_relu=True)
    restored_alike(again, open_model(tmp_path / "ours.gguf"), 0)
    restored_alike(again, open_model(tmp_path / "second.gguf"), 1e-3)
    one, two = (read_gguf(tmp_path / name) for name in ("m.gguf", "second.gguf"))
    assert one.tensors.keys() == two.tensors.keys() and one.metadata.keys() == two.metadata.keys()
    if architecture == "llama":
        for name, tensor in one.tensors.items():
            assert np.array_equal(tensor.data, two.tensors[name].data), name


def test_bfloat16_comes_back_exactly(tmp_path):
    """MiniCPM's weights are bfloat16, whose products with the factors fit into F16 well enough."""
    model = make("minicpm", "BF16", tied=True, **SCALES)
    _, _, path = written(model, tmp_path, "F16")
    again = open_model(path)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        one, other = model.tensors[name].dequantize(), again.tensors[name].dequantize()
        rounded = (other.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
        large = np.abs(one) > 1e-3
        assert np.array_equal(one[large], rounded[large])


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_files_of_others(tmp_path, kind):
    model = make(thresholds=(0.5, 0.5))
    _, _, path = written(model, tmp_path, kind)
    other = published(path, tmp_path / "other.gguf")
    again = open_model(other)
    assert again.config.activation == Activation("relu") and again.config.architecture == "llama"
    assert again.predictors.recalls == (RECALL_AS_PUBLISHED,)
    assert again.predictors.thresholds == ((0.5,), (0.5,))
    assert [fc1.shape for fc1, _ in again.predictors.networks] == [(32, 96), (64, 96)]
    assert again.tensors["model.layers.0.mlp.down_proj.weight"].type == "F16"
    missing = published(path, tmp_path / "zero.gguf", drop=("prosparse.", "powerinfer."))
    assert open_model(missing).predictors.thresholds == ((0.0,), (0.0,))
    # in any order, and with the magic changed for other programs
    file = read_gguf(other)
    backwards = dict(reversed(file.tensors.items()))
    write_gguf(tmp_path / "back.gguf", file.metadata, backwards)
    for name, tensor in open_model(tmp_path / "back.gguf").tensors.items():
        assert np.array_equal(tensor.data, again.tensors[name].data)
    # our own form keeps what is known of the predictors
    convert(other, tmp_path / "ours.gguf")
    assert open_model(tmp_path / "ours.gguf").predictors.thresholds == ((0.5,), (0.5,))


@pytest.mark.parametrize("architecture", ["llama", "minicpm"])
def test_a_head_that_was_quantised_otherwise_stays(tmp_path, architecture):
    """As PowerInfer's own `quantize` does to a file of ours, which keeps our keys."""
    model = make(architecture, tied=True, **(SCALES if architecture == "minicpm" else {}))
    _, _, path = written(model, tmp_path, "F16")
    file = read_gguf(path)
    changed = {
        name: stored(file.tensors[name].dequantize(), kind)
        for name, kind in {"output.weight": "Q8_0", "blk.0.attn_output.weight": "Q5_0"}.items()
    }
    again = open_model(published(path, tmp_path / "q.gguf", drop=("none.",), tensors=changed))
    assert again.config == replace(model.config, tie_word_embeddings=False)
    one, other = matrix(model, "model.embed_tokens"), matrix(again, "lm_head")
    assert np.abs(one - other).max() < 0.02 * np.abs(one).max()
    kind = again.tensors["model.layers.0.self_attn.o_proj.weight"].type
    assert kind == ("Q8_0" if architecture == "minicpm" else "Q5_0")


def test_the_native_engine_runs_it(tmp_path):
    model = make("minicpm", thresholds=(-0.3, -0.6), **SCALES)
    for kind in ("F16", "Q8_0", "Q4_0"):
        _, _, path = written(model, tmp_path, kind)
        logits = []
        for backend in ("cpu", "naive"):
            llm = LLM(open_model(path), mode="predicted", backend=backend, n_threads=1)
            cache = llm.new_cache(8)
            logits.append(np.concatenate([llm.forward([token], cache) for token in (256, 7, 99)]))
        assert np.abs(logits[0] - logits[1]).max() <= 0.03 * np.abs(logits[1]).max()


def test_down_of_any_type_is_read_rightly(tmp_path):
    """PowerInfer reads these as noise; the numbers are there all the same."""
    model = make()
    _, _, path = written(model, tmp_path, "F32")
    down = matrix(model, "mlp.down_proj", 0)
    for kind in ("F32", "Q8_0", "Q5_1"):
        changed = {"blk.0.ffn_down_t.weight": stored(np.ascontiguousarray(down.T), kind)}
        again = open_model(published(path, tmp_path / "m.gguf", tensors=changed))
        assert np.abs(matrix(again, "mlp.down_proj", 0) - down).max() < 0.03 * np.abs(down).max()


SMALL = stored(np.ones((32, 32), np.float32), "F32")
BAD = {
    "bamboo": ({"metadata": {"general.architecture": "bamboo"}}, "bamboo is not supported .*relu"),
    "falcon": ({"metadata": {"general.architecture": "falcon"}}, "falcon is not supported .*no gate"),
    "opt": ({"metadata": {"general.architecture": "opt"}}, "opt is not supported"),
    "placement": ({"metadata": {"general.architecture": "generic.gpu_index"}}, "placement file"),
    "qwen2": ({"metadata": {"general.architecture": "qwen2"}}, "'qwen2' is none of PowerInfer's"),
    "no head": ({"without": ["output.weight"]}, r"output\.weight is missing"),
    "no fc1": ({"without": ["blk.1.fc1.weight"]}, r"blk\.1\.fc1\.weight is missing"),
    "no fc2": ({"without": ["blk.0.fc2.weight"]}, r"blk\.0\.fc2\.weight is missing"),
    "no down": ({"without": ["blk.0.ffn_down_t.weight"]}, r"mlp\.down_proj\.weight is missing"),
    "fc1 bias": ({"tensors": {"blk.0.fc1.bias": SMALL}}, r"blk\.0\.fc1\.bias is not part"),
    "rope": ({"tensors": {"rope_freqs.weight": SMALL}}, "rope_freqs.weight must not"),
    "down": ({"tensors": {"blk.0.ffn_down.weight": SMALL}}, r"blk\.0\.ffn_down\.weight must not"),
    "another layer": ({"tensors": {"blk.2.fc1.weight": SMALL}}, r"blk\.2\.fc1\.weight is not part"),
    "fc2 rows": ({"tensors": {"blk.0.fc2.weight": SMALL}}, r"predictor of layer 0 is .*\(32, 32\), not"),
    "down rows": ({"tensors": {"blk.0.ffn_down_t.weight": SMALL}}, r"mlp\.down_proj\.weight has shape"),
    "threshold": ({"metadata": {"powerinfer.sparse_threshold": float("nan")}}, "must be a finite number"),
    "threshold type": ({"metadata": {"powerinfer.sparse_threshold": 1}}, "must be a finite number"),
    "another key": ({"metadata": {"powerinfer.rank": 1}}, r"powerinfer\.rank is not known"),
    "original key": ({"metadata": {"prosparse.original.rank": 1}}, r"original\.rank is not known"),
    "silu": ({"metadata": {"prosparse.hidden_act": "silu"}}, "contradicts the file"),
    "original": ({"metadata": {"prosparse.original.architecture": "gemma"}}, "must be llama or minicpm"),
    "scales": (
        {
            "metadata": {
                "prosparse.original.architecture": "minicpm",
                "prosparse.original.tie_word_embeddings": True,
            }
        },
        r"original\.embedding_scale must be a positive number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    changes, message = BAD[case]
    _, _, path = written(make(), tmp_path, "F16")
    with pytest.raises(ValueError, match=message) as error:
        open_model(published(path, tmp_path / "bad.gguf", **changes))
    assert "bad.gguf: " in str(error.value)


def test_old_type_numbers(tmp_path):
    """16 to 18 were integers in 2023 and are IQ types today; 30, BF16, did not exist."""
    _, _, path = written(make(), tmp_path, "F32")
    data = path.read_bytes()
    at = data.index(b"blk.0.fc1.weight") + len(b"blk.0.fc1.weight") + 4 + 16
    assert struct.unpack_from("<I", data, at) == (0,)
    for number in (16, 17, 18, 20, 30):
        bad = data[:at] + struct.pack("<I", number) + data[at + 4 :]
        with pytest.raises(ValueError, match=rf"blk\.0\.fc1\.weight: type {number} is not supported"):
            parse(bad, "bad")


# MiniCPM-S-1B: hidden, neurons, layers, heads, KV heads, tokens, rank (which is inferred)
FULL = (1536, 3840, 52, 24, 8, 73440, 128)


def minicpm_s(sizes, rng):
    """MiniCPM-S-1B at these sizes: BF16, tied, with its factors, and a tokenizer without a template."""
    hidden, neurons, layers, heads, kv, vocab, rank = sizes
    config = make("minicpm", **SCALES).config
    config = replace(
        config,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        embedding_scale=12.0,
        residual_scale=float(str(np.float32(1.4 / np.sqrt(layers)))),
        logit_scale=hidden / 256,
        activation=Activation("fatrelu", 0.03),
        bos_token_id=1,
        eos_token_ids=(2,),
    )

    def random_tensor(kind, shape, scale=1.0):
        def data():
            assert rng is not None, "only shapes are asked for"
            values = np.float32(scale) * rng.standard_normal(shape, np.float32)
            return stored(values, kind).data

        return Tensor(kind, shape, data if rng is None else data())

    tensors = {
        name: random_tensor("BF16" if len(shape) == 2 else "F32", shape, 1 / np.sqrt(shape[-1]))
        for name, shape in expected_tensors(config).items()
    }
    networks = tuple(
        (random_tensor("F16", (rank, hidden)), random_tensor("F16", (neurons, rank))) for _ in range(layers)
    )
    found = Predictors("lowrank", "residual", (0.9,), ((0.0,),) * layers, 0.9, networks)
    return Model(config, tensors, spm_tokenizer(vocab), "LLaMA v2", found)


def test_minicpm_s_at_full_size_has_the_published_size():
    """Shapes only: 3.02 GB was published, and that is what this layout takes with predictors of rank 128."""
    prepared = prepare(minicpm_s(FULL, None), "F16", as_relu=True)
    shapes = {name: tensor.shape for name, tensor in prepared.tensors.items()}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (73440, 1536)
    assert shapes["blk.51.ffn_down_t.weight"] == (3840, 1536) and shapes["blk.51.attn_k.weight"] == (
        512,
        1536,
    )
    assert shapes["blk.51.fc1.weight"] == (128, 1536) and shapes["blk.51.fc2.weight"] == (3840, 128)
    assert len(shapes) == 3 + 52 * 11
    types = {t.type for t in prepared.tensors.values() if len(t.shape) == 2}
    assert types == {"F16"}
    assert round(prepared.size_bytes / 1e9, 2) == 3.02
    assert prepared.metadata["general.architecture"] == "llama"


def test_minicpm_s_as_published_answers(tmp_path):
    """The small twin of the published file, holding nothing but what PowerInfer reads."""
    model = minicpm_s((192, 512, 3, 6, 2, 320, 32), np.random.default_rng(3))
    ours, path = tmp_path / "ours.gguf", tmp_path / "MiniCPM-S.gguf"
    prepare(model, "F16", as_relu=True).write(ours)
    published(ours, path, drop=("prosparse.", "powerinfer."))
    keys, tensors = powerinfer_reader.read(path.read_bytes())
    assert not any(key.startswith(("prosparse", "minicpm")) or "template" in key for key in keys)
    again = open_model(path)
    assert again.config.architecture == "llama" and again.config.activation.name == "relu"
    assert again.predictors.thresholds == ((0.0,),) * 3
    llm = LLM(again, mode="predicted", backend="naive")
    assert llm.chat_template == MINICPM
    ids = llm.chat_ids([{"role": "user", "content": "the a"}])
    pieces = [llm.tokenizer.token_text(i) for i in ids]
    assert pieces[0] == "<s>" and pieces.count("<s>") == 1
    assert pieces == ["<s>", "▁", "<用户>", "the", "▁a", "<AI>"]
    answer = llm.chat([{"role": "user", "content": "the a"}], max_tokens=6, sampling=GREEDY)
    # PowerInfer predicts prompts too, our prefill computes them exactly: let both decode token by token
    exact, _ = powerinfer_reader.forward(keys, tensors, ids, threshold=-1e9)
    dense = LLM(again, mode="dense", backend="naive").forward(ids)
    assert np.abs(exact[-1] - dense[0]).max() <= 1e-3 * np.abs(dense).max()
    cache = llm.new_cache()
    history = list(ids)
    logits = np.concatenate([llm.forward([token], cache) for token in history])
    theirs, named = powerinfer_reader.forward(keys, tensors, history)
    assert np.abs(logits - theirs).max() <= 1e-3 * np.abs(theirs).max() and 0.3 < named.mean() < 0.7
    assert len(answer.token_ids) <= 6 and answer.n_prompt == len(ids)
    assert LLM(again, mode="exact", backend="naive").chat(
        [{"role": "user", "content": "the a"}], max_tokens=6, sampling=GREEDY
    ).token_ids[:1] == [int(dense[0].argmax())]
    # with our keys it is MiniCPM again, FATReLU included
    restored = open_model(ours)
    assert restored.config == model.config
    one = LLM(restored, backend="naive").forward(ids)
    other = LLM(model, backend="naive").forward(ids)
    assert np.abs(one - other).max() <= 5e-3 * np.abs(other).max()


def test_mutated_files_open_or_are_refused(tmp_path):
    model = make(
        hidden=32, intermediate=32, layers=1, heads=2, kv=1, vocab=300, ranks=(8,), thresholds=(0.1,)
    )
    _, _, path = written(replace(model, tokenizer=spm_tokenizer(300)), tmp_path, "F16")
    data = path.read_bytes()
    open_bytes(data)
    numbers = [n for n in fields(data) if n[0] < len(data) - 8]
    opened = 0
    logging.disable(logging.ERROR)
    for i in range(300):
        try:
            open_bytes(mutate(data, numbers, random.Random(f"powerinfer {i}")))
            opened += 1
        except ValueError as error:
            assert str(error)
    logging.disable(logging.NOTSET)
    assert 5 < opened < 250


def test_model_from_gguf_names_the_file(tmp_path):
    _, _, path = written(make(), tmp_path, "F16")
    file = read_gguf(published(path, tmp_path / "x.gguf", without=["output.weight"]))
    with pytest.raises(ValueError, match=r"^named: tensor output\.weight"):
        model_from_gguf(file, Path("named"))
