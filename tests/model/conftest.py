"""Text that tries a tokenizer, and small SentencePiece models trained on the spot."""

import inspect
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest


@pytest.fixture(scope="session")
def mixed_text() -> bytes:
    """1.3 MB of prose, code, many scripts, emoji, combining marks, digits, spaces and broken UTF-8."""
    import argparse
    import pydoc_data.topics
    import typing

    rng = random.Random(0)

    def run(alphabet: Callable[[], int], length: int) -> str:
        return "".join(chr(alphabet()) for _ in range(length))

    scripts = [
        lambda: rng.randrange(0x4E00, 0x9FFF),  # CJK
        lambda: rng.randrange(0x3041, 0x30FF),  # kana
        lambda: rng.randrange(0xAC00, 0xD7A3),  # hangul
        lambda: rng.randrange(0x0400, 0x0500),  # Cyrillic
        lambda: rng.randrange(0x0620, 0x0650),  # Arabic
        lambda: rng.randrange(0x0900, 0x0980),  # Devanagari, with its own marks and digits
        lambda: rng.randrange(0x00A0, 0x0250),  # accented Latin, superscripts, fractions
        lambda: rng.choice((ord("e"), ord("o"), rng.randrange(0x0300, 0x0370))),  # combining marks
        lambda: rng.choice((0x1F468, 0x200D, 0x2764, 0xFE0F, rng.randrange(0x1F300, 0x1FAFF))),  # emoji
        lambda: rng.randrange(ord("0"), ord("9") + 1),
        lambda: rng.choice(b" \t\n\r\x0b\x0c") if rng.random() < 0.9 else rng.choice((0xA0, 0x2003, 0x3000)),
        lambda: rng.randrange(0x2000, 0x2BFF),  # punctuation and symbols
        lambda: rng.choice((0, 0x7F, 0xFFFD, 0xFEFF, 0xE000, 0x10FFFF, 0x2581)),  # controls, private, "▁"
    ]
    marks = ["<|im_start|>", "</s>", "<s>", "<0x0A>", "'LL", "'s", "don't", "1,234.5e-6", "½²", "x" * 300]
    parts = [run(rng.choice(scripts), rng.randrange(1, 40)) for _ in range(6000)]
    for _ in range(2000):
        parts.insert(rng.randrange(len(parts)), rng.choice(marks) + rng.choice(("", " ", "\n")))
    sources = [inspect.getsource(module) for module in (pydoc_data.topics, argparse, typing)]
    data = "".join(sources + parts).encode()
    broken = bytearray(data[-60_000:])
    for _ in range(3000):
        broken[rng.randrange(len(broken))] = rng.randrange(256)
    data += bytes(broken)
    assert len(data) > 1_000_000
    return data


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., bytes]:
    """`train_sentencepiece(**options)` gives the bytes of a tokenizer.model of 1,000 pieces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    import textwrap

    lines = [line for line in inspect.getsource(textwrap).splitlines() if line.strip()]
    lines += ["中文 文本 用户 你好 世界", "Être où ça naïve façade — “quotes”"] * 5

    def train(**options: object) -> bytes:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=1000,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **options,
        )
        return out.getvalue()

    return train


@pytest.fixture(scope="session")
def spm_bpe(train_sentencepiece: Callable[..., bytes]) -> bytes:
    """As LLaMA's: BPE, byte fallback, no normalisation."""
    return train_sentencepiece(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        user_defined_symbols=["<tool>", "two▁words"],
    )


@pytest.fixture(scope="session")
def spm_unigram(train_sentencepiece: Callable[..., bytes]) -> bytes:
    """As T5's: unigram, NFKC rules, runs of spaces squeezed, no byte fallback."""
    return train_sentencepiece(model_type="unigram")


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path: Path) -> dict[str, Any]:
    """The tokenizer.* keys of SmolLM2's GGUF, read by the gguf package."""
    fields = gguf.GGUFReader(smollm2_path).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
