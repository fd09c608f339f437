"""Tokenizers between GGUF metadata and the files of a Hugging Face folder, ids unchanged."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, processors

from prosparse.model import bpe, pretokenize
from prosparse.model.bpe import TokenType
from prosparse.model.spm import SPACE, SentencePieceModel

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_PLAIN_MATCH = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, completed from its side files; special tokens as plain strings."""
    config = {
        **_read_json(folder / "special_tokens_map.json"),
        **_read_json(folder / "tokenizer_config.json"),
    }
    for name in _SPECIAL.values():
        if isinstance(config.get(name), dict):
            config[name] = config[name]["content"]
    if (folder / "chat_template.jinja").exists():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif isinstance(config.get("chat_template"), list):
        named = {entry["name"]: entry["template"] for entry in config["chat_template"]}
        config["chat_template"] = named.get("default")
    return config


def read_folder(folder: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """The `tokenizer.*` keys that a GGUF of this folder's model carries.

    `vocab_size` is the number of embedding rows; ids the tokenizer does not use become `[PADn]`.
    """
    config = read_config(folder)
    if (folder / "tokenizer.model").exists():
        metadata = _from_sentencepiece(folder, config)
    elif (folder / "tokenizer.json").exists():
        metadata = _from_tokenizer_json(folder / "tokenizer.json")
    else:
        raise ValueError(f"{folder} holds neither tokenizer.json nor tokenizer.model")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if vocab_size is not None:
        if len(tokens) > vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokens)} tokens, the model only {vocab_size} embeddings"
            )
        padding = range(len(tokens), vocab_size)
        tokens += [f"[PAD{i}]" for i in padding]
        types += [int(TokenType.UNUSED)] * len(padding)
        if "tokenizer.ggml.scores" in metadata:
            metadata["tokenizer.ggml.scores"] += [0.0] * len(padding)
    ids = {token: i for i, token in enumerate(tokens)}
    for key, name in _SPECIAL.items():
        if config.get(name) in ids:
            metadata[f"tokenizer.ggml.{key}_token_id"] = ids[config[name]]
    metadata["tokenizer.ggml.add_bos_token"] = adds_bos(folder, config)
    if config.get("chat_template"):
        metadata["tokenizer.chat_template"] = config["chat_template"]
    return metadata


def adds_bos(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether texts start with BOS: `add_bos_token` if given, else what tokenizer.json does."""
    if (explicit := config.get("add_bos_token")) is not None:
        return bool(explicit)
    if not (folder / "tokenizer.json").exists():
        return True  # SentencePiece models of the LLaMA family do
    first = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").tokens[:1]
    return first == [config.get("bos_token")]


def write_folder(metadata: Mapping[str, Any], folder: Path) -> None:
    """Writes the tokenizer files of a Hugging Face folder from a GGUF's `tokenizer.*` keys."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = bpe.array(metadata, "tokenizer.ggml.tokens", str)
    config: dict[str, Any] = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for key, name in _SPECIAL.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    add_bos = gguf_adds_bos(metadata)
    config |= {"add_bos_token": add_bos, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    folder.mkdir(parents=True, exist_ok=True)
    if model == "gpt2":
        tokenizer = bpe.from_gguf(metadata)
        if add_bos:
            bos = config["bos_token"]
            ids = [(bos, metadata["tokenizer.ggml.bos_token_id"])]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids
            )
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(SentencePieceModel.from_gguf(metadata).serialize())
        # llama.cpp, and so GGUF, puts a space in front of the text after every control token
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        if not metadata.get("tokenizer.ggml.add_space_prefix", True):
            config["add_prefix_space"] = False
        config["added_tokens_decoder"] = {
            str(i): {"content": token, "special": kind != TokenType.USER_DEFINED, **_PLAIN_MATCH}
            for i, (token, kind) in enumerate(
                zip(tokens, bpe.token_types(metadata, len(tokens)), strict=True)
            )
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def gguf_adds_bos(metadata: Mapping[str, Any]) -> bool:
    """`add_bos_token`, or llama.cpp's default for the kind of tokenizer."""
    explicit = metadata.get("tokenizer.ggml.add_bos_token")
    if explicit is not None:
        return bool(explicit)
    model = metadata["tokenizer.ggml.model"]
    return model == "llama" or (
        model == "gpt2" and pretokenize.by_name(metadata.get("tokenizer.ggml.pre")).add_bos
    )


def copy_folder(source: Path, folder: Path) -> None:
    """Copies a folder's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """id -> (text, special) of the tokens a folder adds to its tokenizer.model."""
    added = {i: (token, False) for token, i in _read_json(folder / "added_tokens.json").items()}
    entries: Sequence[Mapping[str, Any]] = _read_json(folder / "tokenizer.json").get("added_tokens", [])
    added |= {e["id"]: (e["content"], e["special"]) for e in entries}
    decoder = config.get("added_tokens_decoder", {})
    return added | {int(i): (e["content"], e.get("special", False)) for i, e in decoder.items()}


def _from_sentencepiece(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    model = SentencePieceModel.parse((folder / "tokenizer.model").read_bytes())
    metadata = model.to_gguf()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for i, (text, special) in sorted(_added_tokens(folder, config).items()):
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        if i < len(model.pieces):
            same = text.replace(" ", SPACE) == model.pieces[i].replace(" ", SPACE)
            if same and types[i] != TokenType.UNKNOWN:
                types[i] = int(kind)
            continue
        for hole in range(len(tokens), i):
            tokens.append(f"[PAD{hole}]")
            types.append(int(TokenType.UNUSED))
        tokens.append(text)
        types.append(int(kind))
    metadata["tokenizer.ggml.scores"] += [0.0] * (len(tokens) - len(model.pieces))
    return metadata


def _from_tokenizer_json(path: Path) -> dict[str, Any]:
    backend = bpe.FastBackend.from_file(path)
    tokenizer = backend.tokenizer
    if not isinstance(tokenizer.model, models.BPE):
        raise ValueError(f"{path} is not BPE: GGUF needs the folder's tokenizer.model")
    data = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in data["merges"]]
    tokens = [f"[PAD{i}]" for i in range(backend.n_vocab)]
    types = [int(TokenType.UNUSED)] * backend.n_vocab
    for token, i in data["vocab"].items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for i, added in tokenizer.get_added_tokens_decoder().items():
        tokens[i] = added.content
        types[i] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if backend.byte_level:
        return metadata | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pretokenize.name_of(tokenizer),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    for i, token in enumerate(tokens):
        if token == data["unk_token"]:
            types[i] = int(TokenType.UNKNOWN)
        elif types[i] == TokenType.NORMAL and bpe.is_byte_piece(token):
            types[i] = int(TokenType.BYTE)
    return metadata | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(tokens, types, merges, path),
        "tokenizer.ggml.add_space_prefix": backend.strips_space,
    }


def _scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]], path: Path
) -> list[float]:
    """SentencePiece scores that merge in the order of `merges`.

    SentencePiece merges any two pieces that make a third. A list that lacks some of those pairs was
    not converted from SentencePiece and cannot be said in scores: ValueError.
    """
    ids = {token: i for i, token in enumerate(tokens) if types[i] == TokenType.NORMAL}
    scores = [0.0] * len(tokens)
    for rank, merge in reversed(list(enumerate(merges, 1))):
        if (i := ids.get("".join(merge))) is not None:
            scores[i] = -float(rank)
    known = set(merges)
    for left, right in ((token[:cut], token[cut:]) for token in ids for cut in range(1, len(token))):
        if left in ids and right in ids and (left, right) not in known:
            raise ValueError(f"{path} does not merge {left!r} and {right!r} as SentencePiece would: no GGUF")
    return scores
