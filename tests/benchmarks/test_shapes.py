"""The made-up models are what they claim: readable by everybody, with weights and sparsity as computed."""

import gguf
import numpy as np
import pytest

import prosparse
from benchmarks import shapes
from prosparse.formats import open_model


@pytest.fixture(params=shapes.TYPES)
def tiny(request, tmp_path):
    """(type, file of the tiny shape)."""
    path = tmp_path / "tiny.gguf"
    shapes.write(shapes.tiny(), request.param, path)
    return request.param, path


def test_gguf_package_reads_it(tiny):
    type, path = tiny
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    shape = shapes.tiny()
    assert set(tensors) == {name for name, *_ in shape.matrices()} | set(shape.norms())
    for name, rows, cols in shape.matrices():
        tensor = tensors[name]
        assert tensor.tensor_type.name == type.upper()
        assert tensor.shape.tolist() == [cols, rows]
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert np.isclose(weights.std(), shapes.weight_std(type), rtol=0.02)
        assert abs(weights.mean()) < 0.02 * shapes.weight_std(type)


@pytest.mark.parametrize("shape", [shapes.minicpm_1b(), shapes.llama_7b()], ids=lambda shape: shape.name)
def test_real_shapes(shape):
    weights = sum(rows * cols for _, rows, cols in shape.matrices())
    assert weights == {"1b": 1_360_084_992, "7b": 1_881_145_344}[shape.name]


@pytest.mark.parametrize("share", [0, 0.67, 0.88, 0.95])
def test_threshold_gives_the_wanted_sparsity(tiny, share):
    type, path = tiny
    param = shapes.threshold(shapes.tiny(), type, share)
    llm = prosparse.load(path, n_ctx=64, mode="exact", hidden_act="fatrelu", hidden_act_param=param)
    cache = llm.new_cache()
    for token in range(3, 3 + 32):
        assert np.isfinite(llm.forward([token], cache)).all()
    stats = llm.stats()
    assert abs(1 - stats["active"] / stats["neurons"] - share) < 0.02


@pytest.mark.parametrize("share", [-0.1, 1, float("nan")])
def test_impossible_share(share):
    with pytest.raises(ValueError, match="share of inactive neurons"):
        shapes.threshold(shapes.tiny(), "q8_0", share)


def test_our_reader_sees_the_config(tiny):
    config = open_model(tiny[1]).config
    shape = shapes.tiny()
    assert (config.hidden_size, config.intermediate_size) == (shape.hidden, shape.ffn)
    assert (config.num_attention_heads, config.num_key_value_heads) == (shape.heads, shape.kv_heads)
    assert (config.head_dim, config.vocab_size) == (shape.head_dim, shape.vocab)
    assert config.tie_word_embeddings
