"""Folders of activations that transformers lacks: what its users load is the model that we run."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.engine.sampler import SamplingParams
from prosparse.formats.hf import read_folder, write_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
AutoModel = transformers.AutoModelForCausalLM
TOKENS = np.random.default_rng(1).integers(0, 256, 33).tolist()
MODULE = "modeling_prosparse.py"

MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 16, "tied": True},
    "qwen2": {"bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "gemma": {"head_dim": 32, "kv": 1},
    "minicpm": {"embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 0.5, "tied": True},
}
ACTS = ("fatrelu_0.3", "shiftrelu_0.2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """transformers copies the module here, not into the user's home."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # of the folder before


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "m"


def load(folder, **options):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def close(a, b, tolerance=1e-4):
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits(tiny_model, folder, name, act):
    model = tiny_model(name, act=act, **MODELS[name])
    write_folder(folder, model, "F32")
    theirs = load(folder, dtype=torch.float32)
    tokens = TOKENS[:16]  # all that a sliding window sees
    native = type(theirs).__mro__[2 if name == "minicpm" else 1].__module__
    assert native.startswith("transformers.models." if name == "minicpm" else f"transformers.models.{name}.")
    ours = LLM(model, backend="naive")
    close(ours.forward(tokens, all_logits=True), logits(theirs, tokens))
    # as many neurons are silent in both
    ours.reset_stats()
    ours.forward(tokens)
    active = []
    for mlp in (layer.mlp for layer in theirs.model.layers):
        mlp.act_fn.register_forward_hook(lambda _, __, out: active.append(int(out.count_nonzero())))
    logits(theirs, tokens)
    assert sum(active) == ours.stats()["prefill_active"] < 0.6 * ours.stats()["prefill_neurons"]


def test_greedy_text(tiny_model, folder):
    model = tiny_model(act="fatrelu_0.05", seed=3)
    write_folder(folder, model, "F32")
    llm = LLM(model)
    ours = llm.generate(TOKENS, max_tokens=24, sampling=SamplingParams(temperature=0)).token_ids
    theirs = load(folder).generate(torch.tensor([TOKENS]), max_new_tokens=24, do_sample=False, use_cache=True)
    assert len(ours) == 24 and theirs[0, len(TOKENS) :].tolist() == list(ours)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "minicpm"])
def test_saved_and_loaded_again(tiny_model, folder, tmp_path, name):
    model = tiny_model(name, act="fatrelu_0.3", **MODELS[name])
    write_folder(folder, model, "F32")
    first = load(folder, dtype=torch.float32)
    first.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["hidden_act"], config["hidden_act_param"], config["model_type"]) == ("fatrelu", 0.3, name)
    assert np.array_equal(logits(load(tmp_path / "again")), logits(first))
    again = read_folder(tmp_path / "again")
    assert replace(again.config, residual_scale=1) == replace(model.config, residual_scale=1)
    assert again.config.residual_scale == pytest.approx(model.config.residual_scale, rel=1e-6)
    assert all(np.array_equal(again.tensors[n].data, t.data) for n, t in model.tensors.items())
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=name == "minicpm")
    assert (config.model_type, config.hidden_act) == (name, "fatrelu")
    assert AutoModel.from_config(config, trust_remote_code=True).config.hidden_act == "fatrelu"


@pytest.mark.parametrize(("act", "tied"), [("silu", False), ("relu", True)])
def test_minicpm_with_any_activation(tiny_model, folder, tmp_path, act, tied):
    """transformers has no class of it; published configs are tied where they do not say."""
    model = tiny_model("minicpm", act=act, **MODELS["minicpm"] | {"tied": tied})
    write_folder(folder, model, "F32")
    with pytest.raises(ValueError, match=r"minicpm|trust_remote_code"):
        AutoModel.from_pretrained(folder, trust_remote_code=False)
    theirs = load(folder)
    expected = LLM(model, backend="naive").forward(TOKENS, all_logits=True)
    close(expected, logits(theirs))
    theirs.save_pretrained(tmp_path / "again")
    close(expected, LLM(read_folder(tmp_path / "again"), backend="naive").forward(TOKENS, all_logits=True))
    edit_config(folder, scale_depth=...)
    with pytest.raises(ValueError, match="scale_depth is missing"):
        load(folder)


@pytest.mark.parametrize("act", ACTS)
def test_refused_without_trust(tiny_model, folder, act):
    write_folder(folder, tiny_model(act=act), "F32")
    for trust in ({}, {"trust_remote_code": False}):
        with pytest.raises((KeyError, ValueError), match=act.partition("_")[0]):
            AutoModel.from_pretrained(folder, **trust)


def test_dense_models_load_after_a_sparse_one(tiny_model, folder, tmp_path):
    """Some versions of transformers then take our class for every model of the architecture."""
    write_folder(folder, tiny_model(act="fatrelu_0.3"), "F32")
    dense = tiny_model()
    write_folder(tmp_path / "dense", dense, "F32")
    sparse_class = type(load(folder))
    theirs = AutoModel.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    expected = LLM(dense, backend="naive").forward(TOKENS, all_logits=True)
    close(expected, logits(theirs))
    edit_config(
        tmp_path / "dense", auto_map={"AutoModelForCausalLM": f"modeling_prosparse.{sparse_class.__name__}"}
    )
    (tmp_path / "dense" / MODULE).write_text((folder / MODULE).read_text())
    close(expected, logits(load(tmp_path / "dense", dtype=torch.float32)))


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("act", ["silu", "relu", "gelu"])
def test_no_module_where_transformers_has_the_activation(tiny_model, folder, name, act):
    model = tiny_model(name, act=act)
    write_folder(folder, model, "F32")
    assert not (folder / MODULE).exists()
    close(
        LLM(model, backend="naive").forward(TOKENS, all_logits=True),
        logits(AutoModel.from_pretrained(folder)),
    )


@pytest.mark.parametrize(("name", "at", "expected"), [("fatrelu", 0.03, 0.03), ("shiftrelu", 0.03, 0.0)])
def test_at_the_threshold(tiny_model, folder, name, at, expected):
    """A gate of exactly t stays with FATReLU. 0.03 has neither a float32 nor a bfloat16 form."""
    write_folder(folder, tiny_model(act=f"{name}_0.03"), "F32")
    act = load(folder).model.layers[0].mlp.act_fn
    x = torch.tensor([at, np.nextafter(np.float32(at), np.float32(0)), -1.0], dtype=torch.float32)
    assert torch.equal(act(x), torch.tensor([expected, 0.0, 0.0]))
    # the neighbours of 0.03 in bfloat16, one below and one above
    below, above = torch.tensor([0.02990722656, 0.03002929688], dtype=torch.bfloat16)
    assert below.float() < 0.03 < above.float() and act(below) == 0
    assert act(above) == (above if name == "fatrelu" else above.float() - 0.03).bfloat16()
    assert act(above).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision(tiny_model, folder, dtype):
    model = tiny_model(type=dtype, act="fatrelu_0.03", layers=1)
    write_folder(folder, model, dtype)
    theirs = load(folder)
    assert theirs.dtype == {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    assert theirs.model.layers[0].mlp.act_fn.threshold == np.float32(0.03)
    close(LLM(model, backend="naive").forward(TOKENS, all_logits=True), logits(theirs), 0.1)
    # in float32 again, the threshold has lost nothing
    exact = load(folder, dtype=torch.float32)
    close(logits(exact), LLM(model, backend="naive").forward(TOKENS, all_logits=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "fatrelu2"}, "fatrelu2"),
        ({"hidden_activation": "silu"}, "contradict"),
        ({"hidden_act_param": None}, "hidden_act_param"),
        ({"hidden_act_param": "0.1"}, "hidden_act_param"),
        ({"hidden_act_param": float("nan")}, "hidden_act_param"),
    ],
)
def test_what_the_module_refuses(tiny_model, folder, changes, message):
    write_folder(folder, tiny_model(act="fatrelu_0.3"), "F32")
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_threshold_zero_is_written(tiny_model, folder):
    model = tiny_model(act="fatrelu_0")
    write_folder(folder, model, "F32")
    assert read_folder(folder).config == model.config
    close(
        LLM(model, backend="naive").forward(TOKENS, all_logits=True),
        logits(load(folder, dtype=torch.float32)),
    )
