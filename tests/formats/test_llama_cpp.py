"""Files in both directions between llama.cpp and this package: same bytes, same logits."""

import ctypes

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.formats import open_model
from prosparse.formats.convert import convert, write_model
from prosparse.model.rope import RopeScaling

llama_cpp = pytest.importorskip("llama_cpp")

MODELS = {
    "llama": {},
    "minicpm": {"embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 6.0, "tied": True},
    "qwen2": {"bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "gemma": {"act": "gelu", "head_dim": 64, "kv": 1},
    "llama linear": {"rope_scaling": RopeScaling("linear", factor=4.0)},
    "llama yarn": {"rope_scaling": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=128)},
    "llama llama3": {"rope_scaling": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=128)},
}
# llama_ftype
NATIVE = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_1": 9, "BF16": 32}
REPACKED = {"Q5_0": 8, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30}


def largest_difference(path):
    """Between our logits of a file and llama.cpp's, as a share of the largest logit."""
    tokens = np.random.default_rng(0).integers(0, 256, 40).tolist()
    theirs = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    theirs.eval(tokens)
    expected = np.array(theirs.scores[: len(tokens)])
    logits = LLM(open_model(path), backend="naive").forward(tokens, all_logits=True)
    return np.abs(logits - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(tiny_model, tmp_path, name):
    path = tmp_path / "m.gguf"
    write_model(path, tiny_model(name.split()[0], hidden=128, **MODELS[name]))
    # llama.cpp keeps keys and values in float16
    assert largest_difference(path) < 2e-3


def quantized_by_llama_cpp(model, folder, ftype, pure):
    write_model(folder / "f32.gguf", model)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = ftype, 1, pure
    path = folder / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(bytes(folder / "f32.gguf"), bytes(path), ctypes.byref(params)) == 0
    return path


@pytest.mark.parametrize("kind", NATIVE)
def test_quantised_to_the_same_bytes(tiny_model, tmp_path, kind):
    model = tiny_model(hidden=256, intermediate=512, layers=1)
    theirs = open_model(quantized_by_llama_cpp(model, tmp_path, NATIVE[kind], True)).tensors
    convert(tmp_path / "f32.gguf", tmp_path / "ours.gguf", kind, pure=True)
    ours = open_model(tmp_path / "ours.gguf").tensors
    assert {tensor.type for tensor in ours.values()} == {"F32", kind}
    for name, tensor in ours.items():
        assert theirs[name].type == tensor.type, name
        assert np.array_equal(theirs[name].data, tensor.data), name


@pytest.mark.parametrize("kind", REPACKED)
def test_types_without_kernels_run(tiny_model, tmp_path, kind):
    model = tiny_model(hidden=256, intermediate=512, layers=1)
    path = quantized_by_llama_cpp(model, tmp_path, REPACKED[kind], False)
    assert kind in {tensor.type for tensor in open_model(path).tensors.values()}
    # llama.cpp rounds the activations to 8 bits for these types
    assert largest_difference(path) < 0.05
