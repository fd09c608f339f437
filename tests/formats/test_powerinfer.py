"""PowerInfer's model files: written exactly as documented, and refused where they cannot be."""

import json
from dataclasses import replace

import gguf
import numpy as np
import powerinfer_reader
import pytest
from powerinfer_cases import SCALES, falling, make, matrix, run_verb, written
from test_predictor_gguf import predictors

from prosparse.formats import convert as convert_verb
from prosparse.formats import inspect as inspect_verb
from prosparse.formats import open_model
from prosparse.formats.convert import write_model
from prosparse.formats.gguf import read_gguf
from prosparse.formats.powerinfer import prepare, with_one_threshold
from prosparse.model.activation import Activation
from prosparse.model.model import Tensor
from prosparse.model.predictor import scores
from prosparse.model.rope import RopeScaling
from prosparse.model.tokenizer import TokenizerData

VALUE_TYPES = {"u32": 4, "i32[]": (9, 5), "f32": 6, "bool": 7, "str": 8, "f32[]": (9, 6), "str[]": (9, 8)}


def permuted(rows, heads):
    """As PowerInfer's converter does it."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def as_bytes(values, kind):
    values = np.ascontiguousarray(values, np.float32)
    if kind == "F32":
        return values.tobytes()
    if kind == "F16":
        return values.astype(np.float16).tobytes()
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).tobytes()


def scalars(architecture):
    return (12.0, 0.75, 1 / 6.0) if architecture == "minicpm" else (1.0, 1.0, 1.0)


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", ["llama", "minicpm"])
def test_every_byte_of_every_tensor(tmp_path, architecture, kind, pure):
    model = make(architecture, tied=True, **(SCALES if architecture == "minicpm" else {}))
    keys, tensors, _ = written(model, tmp_path, kind, pure=pure)
    embedding_by, residual_by, head_by = (np.float32(s) for s in scalars(architecture))
    tokens = "Q8_0" if kind == "Q4_0" and not pure else kind
    down = "Q4_0" if kind == "Q4_0" else "F16"
    embedding = matrix(model, "model.embed_tokens")
    expected = {
        "token_embd": (tokens, embedding * embedding_by),
        "output": (tokens, embedding * head_by),
        "output_norm": ("F32", matrix(model, "model.norm")),
    }
    common = np.float32(np.sqrt(0.5 * 2.0))
    for i, own in enumerate((0.5, 2.0)):
        fc1, fc2 = (t.dequantize() for t in model.predictors.networks[i])
        layer = {
            "attn_norm": ("F32", matrix(model, "input_layernorm", i)),
            "attn_q": (kind, permuted(matrix(model, "self_attn.q_proj", i), 4)),
            "attn_k": (kind, permuted(matrix(model, "self_attn.k_proj", i), 2)),
            "attn_v": (kind, matrix(model, "self_attn.v_proj", i)),
            "attn_output": (kind, matrix(model, "self_attn.o_proj", i) * residual_by),
            "ffn_norm": ("F32", matrix(model, "post_attention_layernorm", i)),
            "ffn_gate": (kind, matrix(model, "mlp.gate_proj", i)),
            "ffn_up": (kind, matrix(model, "mlp.up_proj", i)),
            "ffn_down_t": (down, (matrix(model, "mlp.down_proj", i) * residual_by).T),
            "fc1": (tokens, fc1),
            "fc2": (tokens, fc2 * np.float32(float(common) / own)),
        }
        expected |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    assert tensors.keys() == {f"{name}.weight" for name in expected}
    numbers = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
    for name, (wanted, values) in expected.items():
        found = tensors[f"{name}.weight"]
        assert (found.kind, found.shape) == (numbers[wanted], values.shape), name
        assert found.data == as_bytes(values, wanted), name
        again = powerinfer_reader.Stored(found.kind, found.shape, found.data).values()
        assert np.abs(again - values).max() <= 0.11 * np.abs(values).max(), name
    assert keys["powerinfer.sparse_threshold"] == (VALUE_TYPES["f32"], float(common))


@pytest.mark.parametrize("architecture", ["llama", "minicpm", "mistral"])
def test_every_key_and_its_type(tmp_path, architecture):
    model = make(architecture, **(SCALES if architecture == "minicpm" else {}))
    keys, _, _ = written(model, tmp_path, "F16")
    c = model.config
    expected = {
        "general.architecture": ("str", "llama"),
        "general.name": ("str", model.name),
        "general.file_type": ("u32", 1),
        "general.quantization_version": ("u32", 2),
        "llama.context_length": ("u32", 512),
        "llama.embedding_length": ("u32", 96),
        "llama.block_count": ("u32", 2),
        "llama.feed_forward_length": ("u32", 256),
        "llama.rope.dimension_count": ("u32", 24),
        "llama.attention.head_count": ("u32", 4),
        "llama.attention.head_count_kv": ("u32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("f32", np.float32(1e-5)),
        "llama.rope.freq_base": ("f32", 10000.0),
        "powerinfer.sparse_threshold": ("f32", 1.0),
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.tokens": ("str[]", None),
        "tokenizer.ggml.token_type": ("i32[]", None),
        "tokenizer.ggml.merges": ("str[]", []),
        "tokenizer.ggml.pre": ("str", "gpt-2"),
        "tokenizer.ggml.bos_token_id": ("u32", 256),
        "tokenizer.ggml.eos_token_id": ("u32", 257),
        "tokenizer.ggml.add_bos_token": ("bool", True),
        "prosparse.hidden_act": ("str", "relu"),
        "prosparse.hidden_act_param": ("f32", 0.0),
        "prosparse.original.architecture": ("str", "minicpm" if architecture == "minicpm" else "llama"),
        "prosparse.original.tie_word_embeddings": ("bool", False),
        "prosparse.predictor.kind": ("str", "lowrank"),
        "prosparse.predictor.input": ("str", "residual"),
        "prosparse.predictor.recalls": ("f32[]", None),
        "prosparse.predictor.thresholds": ("f32[]", [1.5, 1.0, 0.5, 1.125, 1.0, 0.875]),
        "prosparse.predictor.default": ("f32", np.float32(0.95)),
        "prosparse.predictor.sketch": ("str", "Q4_0"),
    }
    if architecture == "minicpm":
        expected |= {f"prosparse.original.{name}": ("f32", getattr(c, name)) for name in SCALES}
    assert keys.keys() == expected.keys()
    for key, (kind, value) in expected.items():
        assert keys[key][0] == VALUE_TYPES[kind], key
        assert value is None or keys[key][1] == value, key
    assert len(keys["tokenizer.ggml.tokens"][1]) == c.vocab_size


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (RopeScaling("linear", factor=4.0), {"type": (8, "linear"), "factor": (6, 4.0)}),
        (
            RopeScaling("yarn", factor=4.0, original_max_position_embeddings=128),
            {"type": (8, "yarn"), "factor": (6, 4.0), "original_context_length": (4, 128)},
        ),
    ],
)
def test_rope_scaling(tmp_path, scaling, expected):
    keys, _, path = written(make(rope_scaling=scaling), tmp_path)
    prefix = "llama.rope.scaling."
    assert {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)} == expected
    assert open_model(path).config.rope_scaling == scaling


def test_types_without_one_asked_for(tmp_path):
    kinds = {"BF16": "F16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q5_1": "Q8_0", "F32": "F32"}
    numbers = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
    for kind, wanted in kinds.items():
        _, tensors, _ = written(make(type=kind), tmp_path)
        assert tensors["blk.0.ffn_gate.weight"].kind == numbers[wanted]
        assert tensors["token_embd.weight"].kind == numbers[wanted]
        assert tensors["blk.0.ffn_down_t.weight"].kind == numbers["F16"]
        assert tensors["blk.0.fc1.weight"].kind == numbers["F32"]  # as it was


@pytest.mark.parametrize(
    ("own", "common", "loose"),
    [
        ((0.5, 2.0), 1.0, []),
        ((-0.5, -2.0), -1.0, []),
        ((0.0, 0.0), 0.0, []),
        ((0.0, 2.0), 0.0, [1]),
        ((-0.5, 0.0, -2.0, 3.0), -1.0, [1, 3]),
        ((-1e-5, -1e4), -np.sqrt(0.1), [0]),
        ((1e-7, 2.0), 0.0, [0, 1]),
    ],
)
def test_one_threshold_for_all_layers(tiny_model, own, common, loose):
    config = tiny_model(act="relu", layers=len(own)).config
    before = replace(predictors(config), thresholds=falling(*own))
    after, threshold, found = with_one_threshold(before)
    assert threshold == np.float32(common) and found == loose
    x = np.random.default_rng(0).standard_normal((50, config.hidden_size)).astype(np.float32)
    for layer in range(len(own)):
        one, other = (
            scores("lowrank", x, [t.dequantize() for t in p.networks[layer]]) for p in (before, after)
        )
        for i in range(3):
            asked = one >= np.float32(before.thresholds[layer][i])
            assert np.array_equal(asked, other >= np.float32(after.thresholds[layer][i]))
        named, asked = other >= threshold, one >= np.float32(own[layer])
        if layer in loose:
            assert (named | ~asked).all() and named.sum() >= asked.sum()
            assert named.mean() < 0.6  # close to 0, not all of them
        else:
            assert np.array_equal(named, asked)


def test_loose_layers_are_named():
    (note,) = prepare(make(thresholds=(-0.5, 0.5)), "F16").notes
    assert "one threshold for all layers" in note and "in layers 1 it takes more neurons" in note


REFUSED = {
    "no predictors": (lambda m: replace(m, predictors=None), "run|train them with `prosparse predict`"),
    "sign": (lambda m: replace(m, predictors=predictors(m.config, "sign")), "kind lowrank"),
    "normed": (lambda m: replace(m, predictors=replace(m.predictors, input="normed")), "input residual"),
    "fatrelu": (lambda m: with_config(m, activation=Activation("fatrelu", 0.5)), "--as-relu lets it run"),
    "shiftrelu": (lambda m: with_config(m, activation=Activation("shiftrelu", 0.5)), "the model shiftrelu"),
    "silu": (lambda m: replace(with_config(m, activation=Activation()), predictors=None), "the model silu"),
    "window": (lambda m: with_config(m, sliding_window=64), "no sliding window"),
    "llama3": (
        lambda m: with_config(
            m, rope_scaling=RopeScaling("llama3", factor=8.0, original_max_position_embeddings=128)
        ),
        "not llama3",
    ),
    "no tokenizer": (lambda m: replace(m, tokenizer=TokenizerData()), "needs a tokenizer"),
    "t5": (lambda m: with_tokens(m, {"tokenizer.ggml.model": "t5"}), "not t5"),
    "spm": (lambda m: with_tokens(m, {"tokenizer.ggml.model": "llama"}), "byte token <0x0A>"),
    "no merges": (lambda m: with_tokens(m, {"tokenizer.ggml.merges": ...}), "merges is missing"),
    "twice": (lambda m: with_tokens(m, {"tokenizer.ggml.tokens": ["a"] * 288}), "stands twice"),
    "empty": (
        lambda m: with_tokens(m, {"tokenizer.ggml.tokens": ["", *map(str, range(287))]}),
        "not empty and differ",
    ),
    "few": (lambda m: with_tokens(m, {"tokenizer.ggml.tokens": ["a"]}), "1 tokens, the model 288"),
}


def with_config(model, **changes):
    predictors = model.predictors if changes.get("activation", model.config.activation).sparse else None
    return replace(model, config=replace(model.config, **changes), predictors=predictors)


def with_tokens(model, changes):
    keys = {k: v for k, v in (dict(model.tokenizer.gguf) | changes).items() if v is not ...}
    return replace(model, tokenizer=TokenizerData("gguf", keys))


@pytest.mark.parametrize("case", REFUSED)
def test_what_powerinfer_cannot_run_is_refused(tmp_path, case):
    change, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prepare(change(make()), "F16")


@pytest.mark.parametrize(
    ("architecture", "options"), [("qwen2", {"bias": True}), ("qwen3", {"qk_norm": True}), ("gemma", {})]
)
def test_architectures_that_are_refused(architecture, options):
    with pytest.raises(ValueError, match=f"PowerInfer cannot run {architecture}"):
        prepare(make(architecture, **options))


def test_sizes_and_types_that_are_refused():
    with pytest.raises(ValueError, match="heads of hidden_size / heads, not 4 of 32"):
        prepare(make(head_dim=32))
    for kind in ("BF16", "Q5_1", "Q4_1"):
        with pytest.raises(ValueError, match=f"no kernels that work for {kind.lower()}"):
            prepare(make(), kind)
    with pytest.raises(ValueError, match=r"rows of 48, Q8_0 .* use --type f16"):
        prepare(make(hidden=48), "Q8_0")
    with pytest.raises(ValueError, match=r"blk.0.fc2.weight has rows of 20, Q4_0 .* another rank"):
        prepare(make(ranks=(20,)), "Q4_0", pure=True)
    found = prepare(make(ranks=(20,)), "Q4_0").tensors
    assert found["blk.0.fc2.weight"].type == "F16" and found["blk.0.fc1.weight"].type == "Q8_0"


def test_notes():
    notes = prepare(make(intermediate=160), "F16").notes
    assert len(notes) == 1 and "160 neurons are not a multiple of 256" in notes[0]
    assert not prepare(make(), "F16").notes
    (note,) = prepare(with_tokens(make(), {"tokenizer.ggml.pre": "llama-bpe"}), "F16").notes
    assert "splits texts as gpt-2 does" in note


def test_the_verb(tmp_path, capsys):
    model = make("minicpm", act="fatrelu", act_param=0.1, **SCALES)
    write_model(tmp_path / "m.gguf", model)
    target = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match="--as-relu lets it run"):
        run_verb(convert_verb, tmp_path / "m.gguf", target, "--powerinfer")
    with pytest.raises(ValueError, match="is for PowerInfer files: add --powerinfer"):
        run_verb(convert_verb, tmp_path / "m.gguf", target, "--as-relu")
    with pytest.raises(ValueError, match="leave --no-predictors out"):
        run_verb(convert_verb, tmp_path / "m.gguf", target, "--powerinfer", "--no-predictors")
    with pytest.raises(ValueError, match=r"end in \.gguf"):
        run_verb(convert_verb, tmp_path / "m.gguf", tmp_path / "folder", "--powerinfer", "--as-relu")
    assert not target.exists()
    options = ["--powerinfer", "--as-relu", "--type", "q4_0", "--json"]
    assert run_verb(convert_verb, tmp_path / "m.gguf", target, *options) == 0
    out, err = capsys.readouterr()
    assert "note: PowerInfer runs this file as relu: a gate between 0 and 0.1" in err
    size = sum(tensor.nbytes for tensor in read_gguf(target).tensors.values())
    assert json.loads(out.splitlines()[-1])["size_bytes"] == size
    assert target.read_bytes()[:4] == b"PWRI"
    assert run_verb(inspect_verb, target, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "PowerInfer (PWRI) v3"
    assert report["config"]["architecture"] == "minicpm"
    assert report["predictors"]["kind"] == "lowrank" and report["predictors"]["ranks"] == [32, 64]


def test_nothing_is_left_of_a_failed_write(tmp_path):
    model = make()
    name = "model.layers.1.mlp.up_proj.weight"
    broken = Tensor("F32", (256, 96), lambda: np.full((256, 96), 1e30, np.float32).view(np.uint8))
    prepared = prepare(replace(model, tensors=dict(model.tensors) | {name: broken}), "F16")
    with pytest.raises(ValueError, match="too large for F16"):
        prepared.write(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
