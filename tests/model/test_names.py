"""The name table, and what tensors a configuration asks for."""

import pytest

from prosparse.model import names


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "minicpm", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_expected_name_translates_both_ways(tiny_model, architecture, tied):
    config = tiny_model(
        architecture, tied=tied, bias=architecture == "qwen2", qk_norm=architecture == "qwen3"
    ).config
    expected = names.expected_tensors(config)
    gguf = {names.to_gguf(name): name for name in expected}
    assert None not in gguf and len(gguf) == len(expected)
    assert all(names.from_gguf(name) == hf for name, hf in gguf.items())
    assert ("lm_head.weight" in expected) != (tied or architecture == "gemma")


def test_examples():
    assert names.to_gguf("model.layers.31.mlp.down_proj.weight") == "blk.31.ffn_down.weight"
    assert names.from_gguf("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj.bias"
    assert names.from_gguf("token_embd.weight") == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "name",
    [
        *("", "blk.0", "blk.0.attn_q", "blk.0.ffn_gate_exps.weight", "output.scale", "model.norm.weight"),
        *("blk.x.attn_q.weight", "blk.{}.attn_q.weight", "blk.00.attn_q.weight", "blk.0.blk.1.attn_q.weight"),
    ],
)
def test_unknown_names(name):
    assert names.from_gguf(name) is None


def test_equal_to_the_gguf_package():
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    for name in ("model.embed_tokens", "model.layers.1.self_attn.q_norm", "model.layers.1.mlp.up_proj"):
        assert names.to_gguf(f"{name}.weight") == f"{table.get_name(name)}.weight"


def test_interleaved_heads(tiny_model):
    llama, qwen = tiny_model("llama").config, tiny_model("qwen2", bias=True).config
    q, k, v = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    assert [names.interleaved_heads(llama, name) for name in (q, k, v)] == [4, 2, 0]
    assert [names.interleaved_heads(qwen, name) for name in (q, k, v)] == [0, 0, 0]
    assert names.interleaved_heads(tiny_model("gemma").config, q) == 0


def test_only_norms_of_gemma_are_stored_less_one(tiny_model):
    for architecture in ("llama", "gemma"):
        config = tiny_model(architecture).config
        less = {name for name in names.expected_tensors(config) if names.less_one_in_hf(config, name)}
        assert len(less) == (5 if architecture == "gemma" else 0)
        assert all(name.endswith("norm.weight") for name in less)
