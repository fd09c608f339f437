"""Text to token ids and back, from GGUF metadata or a Hugging Face folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

# Tokens that end a turn under whatever key a model file lists them, if it lists them at all.
_END_OF_TURN = (
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 -- DeepSeek spells it so
)


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """A tokenizer as found in a model file: raw material, nothing built yet."""

    source: Literal["gguf", "hf", "none"] = "none"
    gguf: Mapping[str, Any] = field(default_factory=dict)  # the tokenizer.* keys of a GGUF
    folder: Path | None = None  # holds tokenizer.json or tokenizer.model, and tokenizer_config.json

    def to_gguf_metadata(self, vocab_size: int | None = None) -> dict[str, Any]:
        """The `tokenizer.*` keys of a GGUF; `vocab_size` pads a folder's tokens to the embedding's rows."""
        from prosparse.model import tokenizer_files

        if self.source == "hf":
            return tokenizer_files.read_folder(self._folder(), vocab_size)
        return dict(self.gguf)

    def write_hf(self, folder: Path) -> None:
        """Writes the tokenizer files of a Hugging Face folder; nothing if there is no tokenizer."""
        from prosparse.model import tokenizer_files

        if self.source == "hf":
            tokenizer_files.copy_folder(self._folder(), folder)
        elif self.source == "gguf":
            tokenizer_files.write_folder(self.gguf, folder)

    def _folder(self) -> Path:
        assert self.folder is not None, "an hf tokenizer has a folder"
        return self.folder


class _Backend(Protocol):
    n_vocab: int
    control: frozenset[int]  # tokens that are marks, not text
    strips_space: bool  # the space in front of a text is not part of it

    def encode(self, text: str, special: bool) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def text_of(self, token_id: int) -> str: ...
    def id_of(self, token: str) -> int | None: ...


class Tokenizer:
    """A model's own tokenizer. Ids equal those of the Hugging Face tokenizer it came from."""

    def __init__(
        self,
        backend: _Backend,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        add_bos: bool,
        chat_template: str | None,
    ):
        self._backend = backend
        self.n_vocab = backend.n_vocab
        for token_id in (*eos_ids, *([] if bos_id is None else [bos_id])):
            if not isinstance(token_id, int) or not 0 <= token_id < self.n_vocab:
                raise ValueError(f"special token id {token_id!r} is outside the {self.n_vocab} tokens")
        self.bos_id = bos_id
        endings = {i for name in _END_OF_TURN if (i := backend.id_of(name)) in backend.control}
        self.eos_ids = frozenset(eos_ids) | endings
        self.add_bos = add_bos and bos_id is not None
        self.chat_template = chat_template

    @classmethod
    def build(
        cls, data: TokenizerData, config_bos: int | None = None, config_eos: tuple[int, ...] = ()
    ) -> "Tokenizer":
        """Builds what `data` describes; the config's ids fill what the tokenizer leaves open."""
        if data.source == "hf":
            return cls._from_folder(data._folder(), config_bos, config_eos)
        if data.source == "gguf":
            return cls._from_gguf(data.gguf, config_bos, config_eos)
        raise ValueError("the model file holds no tokenizer; load the Hugging Face folder it came from")

    @classmethod
    def _from_gguf(
        cls, metadata: Mapping[str, Any], config_bos: int | None, config_eos: tuple[int, ...]
    ) -> "Tokenizer":
        from prosparse.model import bpe, spm, tokenizer_files

        model = metadata.get("tokenizer.ggml.model")
        backend: _Backend
        if model == "gpt2":
            backend = bpe.FastBackend(bpe.from_gguf(metadata), len(metadata["tokenizer.ggml.tokens"]))
        elif model in ("llama", "t5"):
            backend = spm.SentencePieceBackend(spm.SentencePieceModel.from_gguf(metadata))
        else:
            raise ValueError(f"tokenizer.ggml.model is {model!r}; gpt2, llama and t5 are supported")
        ends = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
        return cls(
            backend,
            bos_id=metadata.get("tokenizer.ggml.bos_token_id", config_bos),
            eos_ids={*config_eos, *(i for i in ends if i is not None)},
            add_bos=tokenizer_files.gguf_adds_bos(metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    @classmethod
    def _from_folder(cls, folder: Path, config_bos: int | None, config_eos: tuple[int, ...]) -> "Tokenizer":
        from prosparse.model import bpe, tokenizer_files

        if not (folder / "tokenizer.json").exists():
            return cls._from_gguf(tokenizer_files.read_folder(folder), config_bos, config_eos)
        config = tokenizer_files.read_config(folder)
        backend = bpe.FastBackend.from_file(folder / "tokenizer.json")
        bos, eos = (backend.id_of(config.get(name) or "") for name in ("bos_token", "eos_token"))
        bos = config_bos if bos is None else bos
        explicit = config.get("add_bos_token")
        return cls(
            backend,
            bos_id=bos,
            eos_ids={*config_eos, *([] if eos is None else [eos])},
            add_bos=backend.adds_bos(bos) if explicit is None else bool(explicit),
            chat_template=config.get("chat_template"),
        )

    def encode(self, text: str | bytes, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Token ids of `text`; bytes that are not UTF-8 become U+FFFD.

        `special` also reads control tokens spelled in the text, as chat templates need; leave it off
        for what users typed. BOS comes first once, if `add_bos` (default: as the model was trained).
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        elif not text.isascii():
            # lone surrogates have no UTF-8 form
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._backend.encode(text, special)
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise ValueError("this model has no BOS token; encode with add_bos=False")
            if ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
        return ids

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        """The exact bytes of one token, perhaps only a part of a character.

        Control tokens are empty unless `special`.
        """
        if not 0 <= token_id < self.n_vocab:
            raise ValueError(f"token id {token_id} is outside the {self.n_vocab} tokens")
        if token_id in self._backend.control and not special:
            return b""
        return self._backend.token_bytes(token_id)

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The bytes of a whole text, without the space that SentencePiece puts in front of it."""
        data = b"".join(self.token_bytes(i, special=special) for i in ids)
        return data.removeprefix(b" ") if self._backend.strips_space else data

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """`decode_bytes` as text; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, special=special).decode("utf-8", errors="replace")

    def token_text(self, token_id: int | None) -> str:
        """A token as the vocabulary spells it, control tokens included; empty for None."""
        return "" if token_id is None else self._backend.text_of(token_id)
