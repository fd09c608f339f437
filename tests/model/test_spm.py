import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sentencepiece

from prosparse.model.spm import SentencePieceModel
from prosparse.model.tokenizer import Tokenizer, TokenizerData


def build(model: bytes, **keys: Any) -> Tokenizer:
    """The tokenizer of a GGUF that carries `model`."""
    metadata = SentencePieceModel.parse(model).to_gguf()
    metadata |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return Tokenizer.build(TokenizerData("gguf", metadata))


@pytest.mark.parametrize("fixture", ["spm_bpe", "spm_unigram"])
def test_equals_sentencepiece(fixture: str, request: pytest.FixtureRequest, mixed_text: bytes) -> None:
    model = request.getfixturevalue(fixture)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = build(model)
    text = mixed_text.decode(errors="replace")
    ids = oracle.EncodeAsIds(text)
    assert tokenizer.encode(mixed_text, add_bos=False) == ids
    assert tokenizer.encode(text, add_bos=True) == [1, *ids]
    # pieces that are not UTF-8 together are spelled differently, so only whole texts compare
    assert tokenizer.decode(ids) == oracle.DecodeIds(ids)
    for line in text.splitlines()[:3000]:
        assert tokenizer.encode(line, add_bos=False) == oracle.EncodeAsIds(line)


def test_round_trip_is_exact(spm_bpe: bytes, mixed_text: bytes) -> None:
    tokenizer = build(spm_bpe)
    text = mixed_text.decode(errors="replace").replace("\u2581", "_")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == b" " + text.encode()


def test_byte_fallback(spm_bpe: bytes) -> None:
    tokenizer = build(spm_bpe)
    ids = tokenizer.encode("🦙", add_bos=False)
    assert [tokenizer.token_text(i) for i in ids] == ["▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]
    assert [tokenizer.token_bytes(i) for i in ids] == [b" ", b"\xf0", b"\x9f", b"\xa6", b"\x99"]
    assert tokenizer.decode(ids) == "🦙"
    assert tokenizer.encode("<0xF0>", add_bos=False) != ids[1:2], "spelled by a user, not a byte"


def test_bos_exactly_once_and_by_default(spm_bpe: bytes) -> None:
    tokenizer = build(spm_bpe)
    assert tokenizer.add_bos and tokenizer.eos_ids >= {2}
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("<s>abc", special=True).count(1) == 1
    assert tokenizer.encode("<s>abc").count(1) == 1
    assert tokenizer.encode("<s>abc", special=True) == tokenizer.encode("abc")
    assert not build(spm_bpe, add_bos_token=False).add_bos


def test_control_tokens_need_special(spm_bpe: bytes) -> None:
    tokenizer = build(spm_bpe)
    start = tokenizer._backend.id_of("<|im_start|>")
    text = "<|im_start|>user <tool>"
    assert start not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(text, special=True)
    assert ids[1] == start
    # each stretch of text has the model's space prefix
    assert tokenizer.token_text(ids[2]).startswith("▁")
    assert tokenizer.decode(ids) == "user <tool>"


def test_user_defined_tokens_are_text(spm_bpe: bytes) -> None:
    """SentencePiece always reads them, spaces inside included."""
    tokenizer = build(spm_bpe)
    pieces = [tokenizer.token_text(i) for i in tokenizer.encode("a<tool>two words")]
    assert pieces == ["<s>", "▁a", "<tool>", "two▁words"]
    metadata = SentencePieceModel.parse(spm_bpe).to_gguf()
    assert "two words" in metadata["tokenizer.ggml.tokens"], "GGUF spells their spaces plainly"


def test_space_prefix_can_be_off(train_sentencepiece: Callable[..., bytes]) -> None:
    model = train_sentencepiece(model_type="bpe", byte_fallback=True, add_dummy_prefix=False)
    tokenizer = build(model)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = tokenizer.encode("def f", add_bos=False)
    assert ids == oracle.EncodeAsIds("def f")
    assert not tokenizer.token_text(ids[0]).startswith("▁")
    assert tokenizer.decode(tokenizer.encode(" x")) == oracle.DecodeIds(oracle.EncodeAsIds(" x"))


def test_parse_and_serialize_agree(spm_bpe: bytes, spm_unigram: bytes) -> None:
    for data in (spm_bpe, spm_unigram):
        model = SentencePieceModel.parse(data)
        assert SentencePieceModel.parse(model.serialize()) == model
        assert SentencePieceModel.from_gguf(model.to_gguf()) == model


def test_damaged_models(spm_bpe: bytes) -> None:
    """Cut or changed anywhere, a file gives a ValueError or a working model, never a crash."""
    rng = random.Random(0)
    samples = [spm_bpe[:size] for size in [*range(64), *range(64, len(spm_bpe), 397)]]
    for _ in range(300):
        sample = bytearray(spm_bpe)
        for _ in range(rng.randrange(1, 4)):
            sample[rng.randrange(len(sample)) if rng.random() < 0.5 else -rng.randrange(1, 80)] = (
                rng.randrange(256)
            )
        samples.append(bytes(sample))
    for sample in samples:
        with contextlib.suppress(ValueError):
            Tokenizer.build(TokenizerData("gguf", SentencePieceModel.parse(sample).to_gguf()), 1).encode("a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no pieces"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\xff", "middle of a number"),
        (b"\x0a\x05a", "middle"),
        (b"\x08\x05", "not a SentencePiece model"),
    ],
)
def test_bad_model(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SentencePieceModel.parse(data)


def test_bad_metadata(spm_bpe: bytes) -> None:
    n = len(SentencePieceModel.parse(spm_bpe).pieces)
    with pytest.raises(ValueError, match="scores is 1 long"):
        build(spm_bpe, scores=[0.0])
    with pytest.raises(ValueError, match="scores holds NaN"):
        build(spm_bpe, scores=np.full(n, np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="not a working SentencePiece model"):
        build(spm_bpe, token_type=[1] * n)
