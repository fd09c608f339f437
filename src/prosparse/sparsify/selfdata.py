"""Training data that the original model writes itself: documents and conversations, sampled once. Documents
may go on from how those of other text begin, whose names and subjects the model would seldom come to alone.

A store of `tokens.py`, so it is mixed with other sources or used alone.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prosparse.formats.files import written_whole
from prosparse.sparsify.hf_model import Trunk
from prosparse.sparsify.sampling import Sampler
from prosparse.sparsify.tokens import Encoder, TokenStore, written_store

_VERSION = 3  # of what is sampled: another one finds no older store
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
_HERE = "THE-QUESTION-GOES-HERE"
_GIVEN = 8, 64  # tokens that a row goes on from, at least and at most


@dataclass(frozen=True, slots=True)
class Prompts:
    """Text whose documents' beginnings a `share` of all rows goes on from. `weights` are of `stores`."""

    stores: Sequence[TokenStore]
    weights: Sequence[float]
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of rows that go on from text must be 0 to 1, not {self.share}")
        if not self.stores or len(self.stores) != len(self.weights):
            raise ValueError(f"{len(self.stores)} sources and {len(self.weights)} weights: give one of each")
        if min(self.weights) < 0 or not sum(self.weights) > 0:
            raise ValueError("the weights of text to go on from must not be negative, nor all 0")

    def begin(self, rng: np.random.Generator, most: int) -> list[int]:
        """How a document begins, drawn by weight: up to `most` tokens of one document."""
        shares = np.asarray(self.weights) / np.sum(self.weights)
        store = self.stores[int(rng.choice(len(self.stores), p=shares))]
        document = int(rng.integers(len(store.offsets) - 1))
        first, end = (int(place) for place in store.offsets[document : document + 2])
        # without the mark at its end
        count = max(1, min(int(rng.integers(_GIVEN[0], _GIVEN[1] + 1)), end - first - 1, most))
        return [int(token) for token in store.tokens[first : first + count]]


def build(
    trunk: Trunk,
    encoder: Encoder,
    tokens: int,
    cache: Path,
    *,
    context: int,
    batch: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    chat: float = 0.5,
    prompts: Prompts | None = None,
    key: str,
    attention: str = "sdpa",
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """The store of at least `tokens` tokens, whole rows of `context`, sampled unless `cache` has it.

    `key` says which model it is. `chat` is the share of rows that are conversations, if the tokenizer has a
    chat template; `prompts` is what other rows go on from. `batch` rows are sampled at a time; finished
    batches stay in `cache` until the store is whole, so that an interrupted call goes on there.
    `progress(tokens, of_all)` is called after each. Starts of rows are not to be learnt, all else is.
    ValueError for settings that cannot be.
    """
    if tokens < 1 or batch < 1 or context < 2:
        raise ValueError(
            f"{tokens} tokens in rows of {context}, {batch} rows at a time: "
            "at least 1 token, 1 row and a context of 2 are needed"
        )
    count = -(-tokens // context)
    rows = starts(encoder, count, chat, prompts, context - 1, seed)
    settings = {
        "model": key,
        "tokenizer": encoder.fingerprint(),
        "rows": count,
        "context": context,
        "batch": batch,
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "chat": chat,
        "prompts": _described(prompts),
        "version": _VERSION,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    folder, part = cache / name, cache / f".{name}.part"
    if (folder / "meta.json").exists():
        return TokenStore(folder)
    batches = [part / f"{number:06}.npy" for number in range(-(-count // batch))]
    # batches are finished in order
    done = next((i for i, path in enumerate(batches) if not path.exists()), len(batches))
    dtype = np.dtype(np.uint16 if encoder.tokenizer.n_vocab <= 1 << 16 else np.uint32)
    sampled = generate(
        trunk,
        rows,
        context=context,
        batch=batch,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        vocab=encoder.tokenizer.n_vocab,
        attention=attention,
        first=done,
    )
    for number, ids in enumerate(sampled, done):
        with written_whole(batches[number]) as file:
            np.save(file, ids.astype(dtype))
        if progress:
            progress(min((number + 1) * batch, count) * context, count * context)
    _assemble(batches, rows, encoder, chat, folder, settings, dtype)
    shutil.rmtree(part, ignore_errors=True)
    return TokenStore(folder)


def generate(
    trunk: Trunk,
    starts: Sequence[Sequence[int]],
    *,
    context: int,
    batch: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    vocab: int | None = None,
    attention: str = "sdpa",
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Rows that go on from `starts`, `batch` at a time from batch `first` on: int64 [up to batch, context].

    What a batch holds is a function of the seed, its number, its starts and `batch` alone. Options and errors
    are those of `Sampler`.
    """
    if first * batch >= len(starts):
        return
    sampler = Sampler(
        trunk,
        min(batch, len(starts)),
        context,
        temperature=temperature,
        top_p=top_p,
        vocab=vocab,
        attention=attention,
    )
    try:
        for number in range(first, -(-len(starts) // batch)):
            of_batch = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1)
            yield sampler.sample(starts[number * batch : (number + 1) * batch], int(of_batch))
    finally:
        del sampler
        if trunk.head.is_cuda:
            torch.cuda.empty_cache()  # training starts with all of the memory


def starts(
    encoder: Encoder,
    rows: int,
    chat: float,
    prompts: Prompts | None = None,
    most: int = _GIVEN[1] + 1,
    seed: int = 0,
) -> list[list[int]]:
    """The tokens each row starts with, up to `most`: a document's, with `prompts` also how one begins, or a
    conversation's up to what the user asks.

    Conversations are spread evenly over the rows, and documents that go on from text over the others; there
    are no conversations without a chat template.
    """
    if not 0 <= chat <= 1:
        raise ValueError(f"the share of conversations must be between 0 and 1, not {chat}")
    document = _document_start(encoder)
    kinds = _conversations(encoder, rows, chat)
    conversation = _chat_start(encoder) if kinds.any() else []
    found = [conversation if kind else document for kind in kinds]
    if prompts is None or most <= len(document):
        return found
    others = np.flatnonzero(~kinds)
    share = prompts.share * rows / max(1, len(others))
    rng = np.random.default_rng([seed, len(others)])
    for row in others[_spread(len(others), min(1.0, share))]:
        text = prompts.begin(rng, most - len(document))
        found[row] = text if text[: len(document)] == document else [*document, *text]
    return found


def _spread(count: int, share: float) -> np.ndarray:
    """bool [count]: True for a `share`, evenly spread."""
    return np.diff(np.floor(np.arange(count + 1) * share)) > 0


def _described(prompts: Prompts | None) -> object:
    if prompts is None:
        return None
    sources = [(store.source, len(store.tokens)) for store in prompts.stores]
    return {"share": prompts.share, "weights": list(prompts.weights), "sources": sources}


def _conversations(encoder: Encoder, rows: int, chat: float) -> np.ndarray:
    """bool [rows]: which rows are conversations."""
    share = chat if encoder.chat_template or encoder.tokenizer.chat_template else 0.0
    return _spread(rows, share)


def _document_start(encoder: Encoder) -> list[int]:
    """What comes before a document in pre-training: BOS, or the mark that also ends documents."""
    tokenizer = encoder.tokenizer
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    for name in _END_OF_TEXT:
        ids = tokenizer.encode(name, add_bos=False, special=True)
        if len(ids) == 1:
            return ids
    # some instruct models name the mark that begins a turn BOS
    if tokenizer.bos_id is not None and tokenizer.bos_id not in _turn_marks(encoder):
        return [tokenizer.bos_id]
    return [encoder.eos_id]


def _chat_start(encoder: Encoder) -> list[int]:
    """A conversation up to the user's text, which the model then writes, as in Magpie (arXiv 2406.08464)."""
    before, found, _ = encoder.render([{"role": "user", "content": _HERE}]).partition(_HERE)
    if not found:
        raise ValueError("the chat template does not show what the user says; sample documents only (chat 0)")
    tokenizer = encoder.tokenizer
    ids = tokenizer.encode(before, add_bos=False, special=True)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    return ids or _document_start(encoder)


def _turn_marks(encoder: Encoder) -> set[int]:
    """The tokens between the turns of a conversation, which therefore do not end it."""
    said = [{"role": role, "content": _HERE} for role in ("user", "assistant") * 2]
    between = encoder.render(said).split(_HERE)[1:-1]
    return set(encoder.tokenizer.encode("".join(between), add_bos=False, special=True))


class _Documents:
    """Where documents start in a row, after its own start."""

    def __init__(self, encoder: Encoder) -> None:
        tokenizer = encoder.tokenizer
        marks, start = _turn_marks(encoder), set(_document_start(encoder))
        bos = {i for i in (tokenizer.bos_id,) if tokenizer.add_bos and i is not None}
        ends = set(tokenizer.eos_ids) | (start - bos)
        # of a conversation, whose turns may end with the mark of documents; and of a document
        self._ends = {True: ends - marks, False: (ends - marks) or ends}
        self._begins = {True: bos - marks, False: bos}

    def within(self, row: np.ndarray, given: int, conversation: bool) -> np.ndarray:
        """The sorted places in `row` [T] where another document starts, none in its first `given` tokens."""
        after = np.flatnonzero(np.isin(row[:-1], list(self._ends[conversation]))) + 1
        at = np.flatnonzero(np.isin(row, list(self._begins[conversation])))
        places = np.union1d(after, at)
        return places[places > given]


def _assemble(
    batches: list[Path],
    rows: list[list[int]],
    encoder: Encoder,
    chat: float,
    folder: Path,
    settings: dict[str, object],
    dtype: np.dtype,
) -> None:
    """The store of finished batches, in `folder` once all of it is there."""
    with written_store(folder) as part:
        documents, kinds = _Documents(encoder), _conversations(encoder, len(rows), chat)
        offsets, n, row = [], 0, 0
        with (part / "tokens.bin").open("wb") as tokens, (part / "loss.bin").open("wb") as losses:
            for path in batches:
                ids = np.load(path)
                loss = np.ones(ids.shape, np.uint8)
                for i, line in enumerate(ids):
                    given = len(rows[row])
                    loss[i, :given] = 0
                    offsets += [n, *(n + documents.within(line, given, bool(kinds[row])))]
                    n, row = n + len(line), row + 1
                tokens.write(ids.tobytes())
                losses.write(loss.tobytes())
        np.save(part / "offsets.npy", np.array([*offsets, n], np.int64))
        meta = {
            "source": f"{settings['model']}, its own text",
            "tokenizer": settings["tokenizer"],
            "tokens": n,
            "documents": len(offsets),
            "dtype": dtype.name,
            "settings": settings,
        }
        (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
