"""Training text as token ids on disk: written once, in parallel, then mapped.

A store is a folder: `tokens.bin` (uint16 or uint32), `loss.bin` (one byte a token, 1 where it is to be
learnt), `offsets.npy` (where documents start) and `meta.json`. It gets its name when all of it is there.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from prosparse.model.chat import CHATML, render
from prosparse.model.tokenizer import Tokenizer, TokenizerData
from prosparse.sparsify import corpus
from prosparse.sparsify.corpus import Row

_VERSION = 2  # of a store's layout: another one finds no older store
_CHUNK = 64  # rows a worker takes at a time


@dataclass(frozen=True)
class Encoder:
    """Rows to token ids, by the model's own tokenizer and chat template. Travels to worker processes."""

    data: TokenizerData
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None = field(default=None)  # None: the tokenizer's own, or ChatML

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.build(self.data, self.bos_id, self.eos_ids)

    @property
    def eos_id(self) -> int:
        if not self.eos_ids:
            raise ValueError("the model has no end-of-text token; documents could not be told apart")
        return self.eos_ids[0]

    def encode(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """uint32 ids and uint8 loss, [n] each: a document is learnt whole, of a conversation the answers."""
        if isinstance(row, str):
            ids = [*self.tokenizer.encode(row), self.eos_id]
            return np.array(ids, np.uint32), np.ones(len(ids), np.uint8)
        ids, loss = [], []
        for text, learn in self._parts(row):
            part = self.tokenizer.encode(text, add_bos=False, special=True)
            ids += part
            loss += [learn] * len(part)
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids, loss = [bos, *ids], [0, *loss]
        if ids[-1] not in self.tokenizer.eos_ids and not self._ended(ids):
            ids, loss = [*ids, self.eos_id], [*loss, 1]
        return np.array(ids, np.uint32), np.array(loss, np.uint8)

    def _ended(self, ids: list[int]) -> bool:
        """Whether only white space follows an end-of-turn token, as in ChatML."""
        ends = [i for i, token in enumerate(ids) if token in self.tokenizer.eos_ids]
        return bool(ends) and not self.tokenizer.decode(ids[ends[-1] + 1 :]).strip()

    def _parts(self, messages: list[dict[str, str]]) -> Iterator[tuple[str, int]]:
        """The conversation's text cut where answers begin and end, exactly where inference cuts it."""
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("a conversation without an answer has nothing to learn")
        done = 0
        whole = self.render(messages)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = (
                self.render(messages[:i], True) if i else "",
                self.render(messages[: i + 1]),
            )
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                raise ValueError("the chat template rewrites earlier turns; give conversations of one answer")
            yield whole[done : len(before)], 0
            yield whole[len(before) : len(after)], 1
            done = len(after)
        yield whole[done:], 0

    def render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        """A conversation by the chat template; with `prompt`, up to where the assistant answers."""
        template = self.chat_template or self.tokenizer.chat_template or CHATML
        return render(
            template,
            messages,
            add_generation_prompt=prompt,
            bos_token=self.tokenizer.token_text(self.tokenizer.bos_id),
            eos_token=self.tokenizer.token_text(next(iter(self.eos_ids), None)),
        )

    def fingerprint(self) -> str:
        """Changes with anything that changes the ids."""
        metadata = self.data.to_gguf_metadata()
        plain = {
            key: value.tolist() if hasattr(value, "tolist") else value for key, value in metadata.items()
        }
        text = json.dumps([plain, self.bos_id, self.eos_ids, self.chat_template], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class TokenStore:
    """A finished store, mapped. `tokens` [n], `loss` [n], `offsets` [documents + 1]."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.folder = folder
        self.source: str = meta["source"]
        self.tokenizer: str = meta["tokenizer"]  # its fingerprint
        n = meta["tokens"]
        self.tokens = np.memmap(folder / "tokens.bin", np.dtype(meta["dtype"]), "r", shape=(n,))
        self.loss = np.memmap(folder / "loss.bin", np.uint8, "r", shape=(n,))
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")


def encoded_rows(source: str, encoder: Encoder) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each row its ids and whether they are learnt, from a source or a store. ValueError as in `build`."""
    if not _is_store(source):
        yield from (encoder.encode(row) for row in corpus.rows(source))
        return
    store = _opened(Path(source), encoder)
    for start, end in pairwise(store.offsets):
        yield store.tokens[start:end], store.loss[start:end]


def _is_store(source: str) -> bool:
    return (Path(source) / "meta.json").exists()


def build(
    source: str,
    encoder: Encoder,
    cache: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """The store of a source, made unless the cache has it, or the source itself if it is a store.

    `progress(rows, tokens)` is called on the way. ValueError for a source without a single row, or a store
    made with another tokenizer; rows keep their order whatever the number of `workers`.
    """
    if _is_store(source):
        return _opened(Path(source), encoder)
    key = hashlib.sha256(f"{_VERSION} {_state(source)} {encoder.fingerprint()}".encode()).hexdigest()[:24]
    folder = cache / key
    if (folder / "meta.json").exists():
        return TokenStore(folder)
    with written_store(folder) as part:
        _write(source, encoder, part, workers or os.cpu_count() or 1, progress)
    return TokenStore(folder)


def _opened(folder: Path, encoder: Encoder) -> TokenStore:
    """A store that was made before, wherever that was."""
    try:
        store = TokenStore(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is a damaged store of tokens: make it again ({error})") from None
    if store.tokenizer != encoder.fingerprint():
        raise ValueError(f"{folder} holds the tokens of another tokenizer: make it again with this model's")
    return store


@contextmanager
def written_store(folder: Path) -> Iterator[Path]:
    """A folder to write a store in, which gets its name when the block has ended without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield part
        if (folder / "meta.json").exists():  # another process was faster
            shutil.rmtree(part)
        else:
            os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _state(source: str) -> str:
    """Changes when a source's files do; a data set on the Hub counts as fixed."""
    if source.startswith("hf:"):
        return source
    stats = [(path, path.stat()) for path in corpus.files(source)]
    return " ".join(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def _write(
    source: str, encoder: Encoder, folder: Path, workers: int, progress: Callable[[int, int], None] | None
) -> None:
    dtype = np.dtype(np.uint16 if encoder.tokenizer.n_vocab <= 1 << 16 else np.uint32)
    offsets = [0]
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "loss.bin").open("wb") as losses:
        for encoded in _encoded(_chunks(corpus.rows(source)), encoder, workers):
            for ids, loss in encoded:
                tokens.write(ids.astype(dtype).tobytes())
                losses.write(loss.tobytes())
                offsets.append(offsets[-1] + len(ids))
            if progress:
                progress(len(offsets) - 1, offsets[-1])
    if len(offsets) == 1:
        raise ValueError(f"{source} has no rows: there is nothing to train on")
    np.save(folder / "offsets.npy", np.array(offsets, np.int64))
    meta = {
        "source": source,
        "tokenizer": encoder.fingerprint(),
        "tokens": offsets[-1],
        "documents": len(offsets) - 1,
        "dtype": dtype.name,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _chunks(rows: Iterator[Row]) -> Iterator[tuple[Row, ...]]:
    while chunk := tuple(islice(rows, _CHUNK)):
        yield chunk


def _encoded(
    chunks: Iterable[tuple[Row, ...]], encoder: Encoder, workers: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    if workers == 1:
        yield from ([encoder.encode(row) for row in chunk] for chunk in chunks)
        return
    # a copy without the tokenizer it may have built, which does not travel
    with multiprocessing.get_context("spawn").Pool(workers, _start, (replace(encoder),)) as pool:
        yield from pool.imap(_encode_chunk, chunks)


_worker_encoder: Encoder  # of this worker process


def _start(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode_chunk(chunk: tuple[Row, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [_worker_encoder.encode(row) for row in chunk]
