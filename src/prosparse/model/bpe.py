"""Tokenizers that the `tokenizers` library runs: byte-level BPE from GGUF, any tokenizer.json."""

import json
import re
import threading
from collections.abc import Mapping
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models

from prosparse.model import pretokenize


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`; the values are SentencePiece's own piece types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@cache
def byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins: each of the 256 bytes is one character of a token's text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF whose `tokenizer.ggml.model` is gpt2."""
    tokens = array(metadata, "tokenizer.ggml.tokens", str)
    types = token_types(metadata, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds the same token twice")
    rule = pretokenize.by_name(metadata.get("tokenizer.ggml.pre"))
    merges = [tuple(merge.split(" ")) for merge in array(metadata, "tokenizer.ggml.merges", str)]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"tokenizer.ggml.merges holds {' '.join(wrong)!r}, which is not two tokens")
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from None
    tokenizer = Tokenizer(model)
    if normalizer := rule.normalizer():
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = rule.build()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        ]
    )
    return tokenizer


def array(metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> list[Any]:
    """An array of the metadata as a list of `kind`; ValueError names the key that is not one."""
    values = metadata.get(key)
    if values is None:
        raise ValueError(f"{key} is missing: the tokenizer cannot work without it")
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{key} is not an array of {kind.__name__}")
    if length is not None and len(values) != length:
        raise ValueError(f"{key} is {len(values)} long; the vocabulary has {length} tokens")
    return values


def token_types(metadata: Mapping[str, Any], n_vocab: int) -> list[int]:
    """`tokenizer.ggml.token_type`, checked."""
    types = array(metadata, "tokenizer.ggml.token_type", int, n_vocab)
    if unknown := set(types) - set(TokenType):
        raise ValueError(f"tokenizer.ggml.token_type holds {min(unknown)}, which is no type of token")
    return types


class FastBackend:
    """A `tokenizers.Tokenizer` behind the calls that `Tokenizer` needs."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int | None = None):
        self.tokenizer = tokenizer
        if n_vocab is None:
            n_vocab = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.n_vocab = n_vocab
        added = tokenizer.get_added_tokens_decoder()
        self.control = frozenset(i for i, token in added.items() if token.special)
        self._literal = {i: token.content for i, token in added.items()}
        self.byte_level, self.strips_space = _decoder_style(tokenizer)
        # encode_special_tokens is a switch on the shared object, not an argument
        self._lock = threading.Lock()

    @classmethod
    def from_file(cls, path: Path) -> "FastBackend":
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json that can be read: {error}") from None
        return cls(tokenizer)

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def text_of(self, token_id: int) -> str:
        text = self.tokenizer.id_to_token(token_id)
        return "" if text is None else text  # a hole in the vocabulary

    def adds_bos(self, bos_id: int | None) -> bool:
        """Whether the file's own post-processor starts texts with BOS."""
        return bos_id is not None and self.tokenizer.encode("").ids[:1] == [bos_id]

    def encode(self, text: str, special: bool) -> list[int]:
        with self._lock:
            self.tokenizer.encode_special_tokens = not special
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._literal:
            return self._literal[token_id].encode()
        text = self.text_of(token_id)
        if self.byte_level:
            table = byte_of_char()
            return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
        return sentencepiece_bytes(text)


def is_byte_piece(piece: str) -> bool:
    """Whether a SentencePiece piece stands for one byte, as `<0x0A>` does."""
    return re.fullmatch(r"<0x[0-9A-F]{2}>", piece) is not None


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes a SentencePiece piece stands for; U+2581 is a space."""
    return bytes.fromhex(piece[3:5]) if is_byte_piece(piece) else piece.replace("\u2581", " ").encode()


def _decoder_style(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """(byte-level, drops the space at the start of a text), read off the decoder."""
    if tokenizer.decoder is None:
        raise ValueError("the tokenizer.json has no decoder; only ByteLevel and SentencePiece styles work")
    node = json.loads(tokenizer.decoder.__getstate__())
    parts = node["decoders"] if node["type"] == "Sequence" else [node]
    kinds = {part["type"]: part for part in parts}
    if "ByteLevel" in kinds:
        return True, False
    if "Metaspace" in kinds:
        return False, kinds["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in kinds:
        return False, kinds.get("Strip", {}).get("start", 0) > 0
    raise ValueError(f"the tokenizer.json decodes with {', '.join(kinds)}, which is not supported")
