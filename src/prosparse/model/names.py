"""Tensor names: Hugging Face names are canonical, one table gives the GGUF ones."""

import re

from prosparse.model.config import ModelConfig

# HF module -> GGUF module; {} is the layer
_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_FROM_GGUF = {gguf: hf for hf, gguf in _MODULES.items()}
_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]*)(?=\.)")


def _translate(name: str, table: dict[str, str]) -> str | None:
    layer = _NUMBER.search(name)
    pattern = _NUMBER.sub("{}", name, count=1)
    module, _, kind = pattern.rpartition(".")
    if module not in table or kind not in ("weight", "bias") or "{}" in name:
        return None
    return f"{table[module].format(layer and layer[0])}.{kind}"


def to_gguf(name: str) -> str | None:
    """`model.norm.weight` -> `output_norm.weight`; None for a name that is not in the table."""
    return _translate(name, _MODULES)


def from_gguf(name: str) -> str | None:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`; None if not in the table."""
    return _translate(name, _FROM_GGUF)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this configuration has, with its shape (rows, columns)."""
    d, d_ff, head = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * head, config.num_key_value_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q_rows, d),
        "self_attn.k_proj.weight": (kv_rows, d),
        "self_attn.v_proj.weight": (kv_rows, d),
        "self_attn.o_proj.weight": (d, q_rows),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (d_ff, d),
        "mlp.up_proj.weight": (d_ff, d),
        "mlp.down_proj.weight": (d, d_ff),
    }
    if config.attention_bias:
        layer |= {
            "self_attn.q_proj.bias": (q_rows,),
            "self_attn.k_proj.bias": (kv_rows,),
            "self_attn.v_proj.bias": (kv_rows,),
        }
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for i in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, d)
    return tensors


def less_one_in_hf(config: ModelConfig, name: str) -> bool:
    """Whether transformers keeps this weight less 1: Gemma's norms, which multiply by 1 + weight there.

    A `Model` holds what norms multiply by, as GGUF does.
    """
    return config.architecture == "gemma" and name.endswith("norm.weight")


def interleaved_heads(config: ModelConfig, name: str) -> int:
    """Heads of a q or k projection whose rows GGUF stores pair-interleaved (0: stored as in HF).

    llama.cpp's llama and minicpm graphs rotate neighbouring rows, so its converter reorders these.
    """
    if config.architecture in ("qwen2", "qwen3", "gemma") or not name.endswith("weight"):
        return 0
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0
