"""SentencePiece tokenizers: `tokenizer.model` files and the pieces, scores and types of a GGUF.

The `sentencepiece` library does the encoding. A GGUF keeps the parts of its model file, so the file
is put together again; the protobuf wire format needs only the few fields below, read and written
here by hand (sentencepiece_model.proto gives their numbers).
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece

from prosparse.model.bpe import TokenType, array, sentencepiece_bytes, token_types

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
# field numbers of ModelProto, its SentencePiece, TrainerSpec and NormalizerSpec
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _SUFFIX, _BYTE_FALLBACK, _UNK_PIECE = 3, 4, 24, 35, 45
_NAME, _CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE = 1, 2, 3, 4, 5
_ALGORITHMS = {"t5": UNIGRAM, "llama": BPE}  # by GGUF's tokenizer.ggml.model


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What decides the ids of a SentencePiece model."""

    pieces: list[str]
    scores: list[float]
    types: list[int]  # TokenType
    algorithm: int = BPE
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""  # compiled normalisation rules; empty is the identity
    treat_whitespace_as_suffix: bool = False

    @classmethod
    def parse(cls, data: bytes) -> "SentencePieceModel":
        """Reads a `tokenizer.model`."""
        try:
            return cls._parse(data)
        except (AttributeError, TypeError, struct.error) as error:  # a field of another kind than named
            raise ValueError(f"not a SentencePiece model: {error}") from None

    @classmethod
    def _parse(cls, data: bytes) -> "SentencePieceModel":
        pieces, scores, types = [], [], []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(data):
            if number == _PIECES:
                piece = dict(_fields(value))
                pieces.append(piece.get(_PIECE, b"").decode())
                scores.append(struct.unpack("<f", piece[_SCORE])[0] if _SCORE in piece else 0.0)
                types.append(piece.get(_TYPE, int(TokenType.NORMAL)))
            elif number == _TRAINER:
                trainer = dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("the tokenizer.model holds no pieces; it is not a SentencePiece model")
        algorithm = trainer.get(_MODEL_TYPE, UNIGRAM)
        if algorithm not in (UNIGRAM, BPE):
            raise ValueError(f"SentencePiece model type {algorithm} is not supported (only BPE and unigram)")
        if not normalizer.get(_ESCAPE, 1):
            raise ValueError("a SentencePiece model without escape_whitespaces is not supported")
        return cls(
            pieces,
            scores,
            types,
            algorithm,
            byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
            add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
            remove_extra_whitespaces=bool(normalizer.get(_EXTRA_SPACES, 1)),
            charsmap=normalizer.get(_CHARSMAP, b""),
            treat_whitespace_as_suffix=bool(trainer.get(_SUFFIX, 0)),
        )

    def serialize(self) -> bytes:
        """The bytes of a `tokenizer.model`."""
        out = bytearray()
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            out += _blob(
                _PIECES, _blob(_PIECE, piece.encode()) + _float(_SCORE, score) + _number(_TYPE, kind)
            )
        trainer = _number(_MODEL_TYPE, self.algorithm) + _number(_VOCAB_SIZE, len(self.pieces))
        trainer += _number(_SUFFIX, self.treat_whitespace_as_suffix)
        trainer += _number(_BYTE_FALLBACK, self.byte_fallback)
        if TokenType.UNKNOWN in self.types:
            trainer += _blob(_UNK_PIECE, self.pieces[self.types.index(TokenType.UNKNOWN)].encode())
        normalizer = _blob(_NAME, b"" if self.charsmap else b"identity") + _blob(_CHARSMAP, self.charsmap)
        normalizer += _number(_DUMMY_PREFIX, self.add_dummy_prefix)
        normalizer += _number(_EXTRA_SPACES, self.remove_extra_whitespaces)
        return bytes(out + _blob(_TRAINER, trainer) + _blob(_NORMALIZER, normalizer))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "SentencePieceModel":
        """From `tokenizer.ggml.*` keys; `llama` is BPE by score, `t5` is unigram."""
        algorithm = _ALGORITHMS[metadata["tokenizer.ggml.model"]]
        tokens = array(metadata, "tokenizer.ggml.tokens", str)
        types = token_types(metadata, len(tokens))
        scores = array(metadata, "tokenizer.ggml.scores", float, len(tokens))
        if not all(map(math.isfinite, scores)):
            raise ValueError("tokenizer.ggml.scores holds NaN or infinity")
        # GGUF spells the spaces of user-defined tokens plainly
        pieces = [
            t.replace(" ", SPACE) if kind == TokenType.USER_DEFINED else t
            for t, kind in zip(tokens, types, strict=True)
        ]
        charsmap = np.asarray(metadata.get("tokenizer.ggml.precompiled_charsmap", []))
        return cls(
            pieces,
            scores,
            types,
            algorithm,
            byte_fallback=TokenType.BYTE in types,
            add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
            remove_extra_whitespaces=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
            charsmap=charsmap.astype(np.uint8).tobytes(),  # some files store it as i8
        )

    def to_gguf(self) -> dict[str, Any]:
        """The same as `tokenizer.ggml.*` keys."""
        if self.treat_whitespace_as_suffix:
            raise ValueError("GGUF cannot say that this tokenizer writes spaces after words")
        names = {algorithm: name for name, algorithm in _ALGORITHMS.items()}
        metadata: dict[str, Any] = {
            "tokenizer.ggml.model": names[self.algorithm],
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [
                p.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else p
                for p, kind in zip(self.pieces, self.types, strict=True)
            ],
            "tokenizer.ggml.scores": list(self.scores),
            "tokenizer.ggml.token_type": [int(t) for t in self.types],
            "tokenizer.ggml.add_space_prefix": self.add_dummy_prefix,
            "tokenizer.ggml.remove_extra_whitespaces": self.remove_extra_whitespaces,
        }
        if self.charsmap:
            metadata["tokenizer.ggml.precompiled_charsmap"] = np.frombuffer(self.charsmap, np.uint8)
        return metadata


class SentencePieceBackend:
    """A SentencePiece model behind the calls that `Tokenizer` needs.

    Control tokens are found in the text only when asked for. As in llama.cpp, every stretch of text
    between two of them is encoded alone, so each starts with the model's space prefix.
    """

    def __init__(self, model: SentencePieceModel):
        self._pieces, self._types = model.pieces, model.types
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model.serialize())
        except RuntimeError as error:
            raise ValueError(f"the tokenizer is not a working SentencePiece model: {error}") from None
        self.n_vocab = len(model.pieces)
        self.strips_space = model.add_dummy_prefix
        self.control = frozenset(i for i, kind in enumerate(model.types) if kind == TokenType.CONTROL)
        self._special = {
            piece: i
            for i, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True))
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN)
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._id_of: dict[str, int] = {}

    def id_of(self, token: str) -> int | None:
        if not self._id_of:
            self._id_of = {piece: i for i, piece in enumerate(self._pieces)}
        return self._id_of.get(token)

    def text_of(self, token_id: int) -> str:
        return self._pieces[token_id]

    def encode(self, text: str, special: bool) -> list[int]:
        if not special:
            return self._processor.EncodeAsIds(text)
        ids: list[int] = []
        for i, part in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._special[part])
            elif part:
                ids += self._processor.EncodeAsIds(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        kind, piece = self._types[token_id], self._pieces[token_id]
        if kind == TokenType.CONTROL:
            return piece.encode()
        if kind == TokenType.UNKNOWN:
            return " \u2047 ".encode()  # what the library prints
        return sentencepiece_bytes(piece)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: int for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"not a SentencePiece model: protobuf wire type {wire}")
        if at + size > len(data):
            raise ValueError("the SentencePiece model ends in the middle of a field")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("the SentencePiece model ends in the middle of a number")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _encode_varint(field << 3) + _encode_varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _encode_varint(field << 3 | 5) + struct.pack("<f", value)


def _blob(field: int, value: bytes) -> bytes:
    return _encode_varint(field << 3 | 2) + _encode_varint(len(value)) + value
