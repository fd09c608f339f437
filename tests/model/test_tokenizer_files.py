"""Tokenizers survive the trip between GGUF and Hugging Face folders: same ids, same special tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, processors

from prosparse.model import pretokenize
from prosparse.model.spm import SentencePieceModel
from prosparse.model.tokenizer import Tokenizer, TokenizerData


def same(a: Tokenizer, b: Tokenizer, text: bytes) -> None:
    for special in (False, True):
        assert a.encode(text, special=special) == b.encode(text, special=special)
    assert (a.bos_id, a.eos_ids, a.add_bos, a.n_vocab) == (b.bos_id, b.eos_ids, b.add_bos, b.n_vocab)
    assert a.chat_template == b.chat_template


def trips(data: TokenizerData, folder: Path, text: bytes) -> dict[str, Any]:
    """GGUF -> folder -> GGUF, compared at every stop; returns the last metadata."""
    data.write_hf(folder)
    start = Tokenizer.build(data)
    in_folder = TokenizerData("hf", folder=folder)
    same(start, Tokenizer.build(in_folder), text)
    metadata = in_folder.to_gguf_metadata(vocab_size=start.n_vocab)
    same(start, Tokenizer.build(TokenizerData("gguf", metadata)), text)
    return metadata


def test_smollm2(smollm2_metadata: dict[str, Any], tmp_path: Path, mixed_text: bytes) -> None:
    text = mixed_text[-200_000:]
    metadata = trips(TokenizerData("gguf", smollm2_metadata), tmp_path, text)
    assert metadata.items() <= smollm2_metadata.items()
    assert smollm2_metadata.keys() - metadata.keys() == {"tokenizer.ggml.add_space_prefix"}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.build(TokenizerData("gguf", smollm2_metadata))
    assert theirs.encode(text.decode(errors="replace")) == ours.encode(text, special=True)


def test_bpe_with_bos(smollm2_metadata: dict[str, Any], tmp_path: Path) -> None:
    data = TokenizerData("gguf", {**smollm2_metadata, "tokenizer.ggml.add_bos_token": True})
    assert trips(data, tmp_path, b"Hello world")["tokenizer.ggml.add_bos_token"]
    assert HFTokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("hi").ids[0] == 1
    # a folder that does not say add_bos_token is read by what its tokenizer.json does
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["add_bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.build(TokenizerData("hf", folder=tmp_path)).encode("hi")[0] == 1


@pytest.mark.parametrize("fixture", ["spm_bpe", "spm_unigram"])
def test_sentencepiece(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path, mixed_text: bytes
) -> None:
    metadata = SentencePieceModel.parse(request.getfixturevalue(fixture)).to_gguf() | {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    back = trips(TokenizerData("gguf", metadata), tmp_path, mixed_text[-200_000:])
    charsmaps = [m.pop("tokenizer.ggml.precompiled_charsmap", np.array([])) for m in (back, metadata)]
    assert back == metadata and np.array_equal(*charsmaps)


def test_original_sentencepiece_folder(spm_bpe: bytes, tmp_path: Path, mixed_text: bytes) -> None:
    """tokenizer.model beside a config, with a token added behind its pieces, as chat models do."""
    (tmp_path / "tokenizer.model").write_bytes(spm_bpe)
    n = len(SentencePieceModel.parse(spm_bpe).pieces)
    added = {str(n + 1): {"content": "<|call|>", "special": True}, str(n + 2): {"content": "<think>"}}
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|call|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    data = TokenizerData("hf", folder=tmp_path)
    tokenizer = Tokenizer.build(data)
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.add_bos) == (n + 3, 1, True)
    assert n + 1 in tokenizer.eos_ids and tokenizer.chat_template == "{{ bos_token }}"
    assert tokenizer.encode("<think>")[1:] == [tokenizer._backend.id_of("▁"), n + 2]
    assert tokenizer.encode("<|call|>", special=True) == [1, n + 1]
    assert n + 1 not in tokenizer.encode("<|call|>")
    metadata = data.to_gguf_metadata(vocab_size=n + 10)
    assert metadata["tokenizer.ggml.tokens"][n] == f"[PAD{n}]"
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.scores"]) == n + 10
    padded = Tokenizer.build(TokenizerData("gguf", metadata))
    text = mixed_text[-50_000:]
    assert padded.encode(text, special=True) == tokenizer.encode(text, special=True)
    data.write_hf(tmp_path / "copy")
    same(tokenizer, Tokenizer.build(TokenizerData("hf", folder=tmp_path / "copy")), text)


def llama_json(model: SentencePieceModel, drop_merge: bool = False) -> HFTokenizer:
    """What transformers makes of a LLaMA tokenizer.model: merges in the order of the scores."""
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    merges = [
        (-model.scores[i], (piece[:cut], piece[cut:]))
        for piece, i in ids.items()
        for cut in range(1, len(piece))
        if model.types[i] == 1 and piece[:cut] in ids and piece[cut:] in ids
    ]
    ranked = [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
    bpe = models.BPE(ids, ranked[drop_merge:], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = HFTokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def test_sentencepiece_as_tokenizer_json(spm_bpe: bytes, tmp_path: Path, mixed_text: bytes) -> None:
    """Folders saved by transformers 5 have no tokenizer.model; their merges give the scores."""
    theirs = llama_json(SentencePieceModel.parse(spm_bpe))
    theirs.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    data = TokenizerData("hf", folder=tmp_path)
    tokenizer = Tokenizer.build(data)
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, True)
    text = mixed_text.decode(errors="replace")[:200_000]
    assert tokenizer.encode(text, special=True) == theirs.encode(text).ids
    ids = tokenizer.encode("naïve 🦙\tx")
    assert tokenizer.decode(ids) == theirs.decode(ids) == "naïve 🦙\tx"
    from_gguf = Tokenizer.build(TokenizerData("gguf", data.to_gguf_metadata()))
    same(from_gguf, tokenizer, text.encode())


def test_merges_that_are_not_sentencepiece(spm_bpe: bytes, tmp_path: Path) -> None:
    llama_json(SentencePieceModel.parse(spm_bpe), drop_merge=True).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="as SentencePiece would"):
        TokenizerData("hf", folder=tmp_path).to_gguf_metadata()


def test_llama3_style_folder(tmp_path: Path) -> None:
    """A byte-level tokenizer.json: its rule is recognised by what it does."""
    rule = pretokenize.by_name("llama-bpe")
    vocab = {token: i for i, token in enumerate(["a", "b", "ab", "Ġ", "Ġab", "<|begin_of_text|>"])}
    tokenizer = HFTokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "ab")], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = rule.build(), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 5)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<|begin_of_text|>", "chat_template": [{"name": "default", "template": "x"}]}
        )
    )
    data = TokenizerData("hf", folder=tmp_path)
    metadata = data.to_gguf_metadata(vocab_size=8)
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe" and metadata["tokenizer.ggml.add_bos_token"]
    assert metadata["tokenizer.ggml.tokens"][5:] == ["<|begin_of_text|>", "<|eot_id|>", "[PAD7]"]
    assert metadata["tokenizer.ggml.token_type"] == [1, 1, 1, 1, 1, 3, 3, 5]
    built = Tokenizer.build(data)
    assert built.encode("ab ab") == [5, 2, 4] and built.eos_ids == {6} and built.chat_template == "x"
    same(built, Tokenizer.build(TokenizerData("gguf", data.to_gguf_metadata())), b"ab<|eot_id|> a b")


def test_bad_folders(tmp_path: Path, smollm2_metadata: dict[str, Any]) -> None:
    data = TokenizerData("hf", folder=tmp_path)
    with pytest.raises(ValueError, match="holds neither"):
        Tokenizer.build(data)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer.build(data)
    TokenizerData("gguf", smollm2_metadata).write_hf(tmp_path)
    with pytest.raises(ValueError, match="49152 tokens, the model only 100"):
        data.to_gguf_metadata(vocab_size=100)
