"""Small random models made in memory, with a tokenizer of one token a byte."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from prosparse.formats import quants
from prosparse.model import bpe
from prosparse.model.activation import Activation
from prosparse.model.config import ModelConfig
from prosparse.model.model import Model, Tensor
from prosparse.model.names import expected_tensors
from prosparse.model.tokenizer import TokenizerData

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(vocab: int) -> TokenizerData:
    """A GGUF tokenizer without merges: one token a byte, then `SPECIAL`, then unused ones."""
    chars = {byte: char for char, byte in bpe.byte_of_char().items()}
    tokens = [chars[b] for b in range(256)] + SPECIAL
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab)]
    kinds = [bpe.TokenType.NORMAL] * 256 + [bpe.TokenType.CONTROL] * 4
    kinds += [bpe.TokenType.UNUSED] * (vocab - len(kinds))
    return TokenizerData(
        "gguf",
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 256,
            "tokenizer.ggml.eos_token_id": 257,
            "tokenizer.ggml.add_bos_token": True,
        },
    )


def stored(values: np.ndarray, type: str) -> Tensor:
    """A float32 array as a tensor of any native type."""
    if type == "F32":
        return Tensor(type, values.shape, np.ascontiguousarray(values).view(np.uint8))
    return Tensor(type, values.shape, quants.quantize(values, type))


def make_tiny(
    architecture: str = "llama",
    type: str = "F32",
    *,
    hidden: int = 96,
    intermediate: int = 160,
    layers: int = 2,
    heads: int = 4,
    kv: int = 2,
    head_dim: int | None = None,
    vocab: int = 288,
    act: str = "silu",
    act_param: float | None = None,
    tied: bool = False,
    bias: bool = False,
    qk_norm: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Model:
    """A random model with a byte tokenizer; `overrides` are further ModelConfig fields.

    Weights are scaled so that every part of the layer matters and logits spread by a few units: greedy
    choices then survive the rounding of any correct engine. Quantised types need sizes that are multiples
    of 32. Gemma is tied, and scales its embeddings, without being told.
    """
    if architecture == "gemma":
        tied, overrides = True, {"embedding_scale": math.sqrt(hidden)} | overrides
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        attention_bias=bias,
        qk_norm=qk_norm,
        activation=Activation.parse(act, act_param),
        bos_token_id=256,
        eos_token_ids=(257,),
    )
    config = replace(config, **overrides)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values *= 0.3
        else:
            gain = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0, "embed_tokens": 1.0}
            if architecture == "gemma":
                gain["embed_tokens"] = 3.0 / math.sqrt(hidden)
            part = name.removesuffix(".weight").rpartition(".")[2]
            values *= gain.get(part, 1.0) / (1.0 if part == "embed_tokens" else np.sqrt(shape[1]))
        tensors[name] = stored(values, type if len(shape) == 2 else "F32")
    return Model(config, tensors, byte_tokenizer(vocab), f"tiny-{architecture}-{type.lower()}")
