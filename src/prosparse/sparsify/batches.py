"""Sequences for training: which tokens step i sees is a function of the seed and i alone.

So a run resumes at any step without replaying, and any number of processes sees the same data.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from prosparse.sparsify.tokens import TokenStore

_CHOICES = 1 << 14  # sequences whose sources are drawn together


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` int64 [sequences, context + 1]; `loss` bool, alike, True where a token is to be learnt;
    `document` int32, alike, counting documents within each sequence."""

    tokens: np.ndarray
    loss: np.ndarray
    document: np.ndarray


class Mixture:
    """Packed sequences drawn from stores by weight. Each store's blocks are shuffled anew every epoch.

    The last `held_out` blocks of each store, but no more than an eighth, are never trained on. `noise` is the
    share of tokens that others, at random, take the place of, in every second sequence.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float],
        *,
        context: int,
        seed: int,
        vocab_size: int,
        held_out: int = 0,
        noise: float = 0.0,
    ) -> None:
        if not 0 <= noise < 1:
            raise ValueError(f"the share of tokens that noise replaces must be 0 to 1, not {noise}")
        if not stores or len(stores) != len(weights):
            raise ValueError(f"{len(stores)} data sources and {len(weights)} weights: give one of each")
        if context < 1:
            raise ValueError(f"the context must be at least 1 token, not {context}")
        for store in stores:
            if len(store.tokens) <= context:
                raise ValueError(
                    f"{store.source} has {len(store.tokens)} tokens, one sequence needs {context + 1}: "
                    "give more data or a smaller context"
                )
            if (top := int(store.tokens.max())) >= vocab_size:
                raise ValueError(
                    f"{store.source} holds token {top}, the model knows {vocab_size}: wrong tokenizer"
                )
        self._stores = list(stores)
        self._shares = np.cumsum(weights) / np.sum(weights)
        self.context, self._seed = context, seed
        self.noise, self._vocab_size = noise, vocab_size
        whole = [(len(store.tokens) - 1) // context for store in stores]
        self._held_out = [min(held_out, blocks // 8) for blocks in whole]
        self._blocks = [blocks - held for blocks, held in zip(whole, self._held_out, strict=True)]
        self._before = [np.zeros(len(stores), np.int64)]  # sequences drawn of each source before every chunk
        # the chunk drawn last: its number, each sequence's source, and how many of that source came before
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def blocks(self, source: int) -> int:
        """Sequences in one epoch of a source."""
        return self._blocks[source]

    @property
    def sources(self) -> list[str]:
        return [store.source for store in self._stores]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, start token) of sequence `index` of the run."""
        chunk, at = divmod(index, _CHOICES)
        while len(self._before) <= chunk:
            drawn = np.bincount(self._choices(len(self._before) - 1), minlength=len(self._stores))
            self._before.append(self._before[-1] + drawn)
        if self._drawn is None or self._drawn[0] != chunk:
            choices = self._choices(chunk)
            ranks = np.empty_like(choices)
            for source in range(len(self._stores)):
                mine = choices == source
                ranks[mine] = np.arange(mine.sum())
            self._drawn = chunk, choices, ranks
        _, choices, ranks = self._drawn
        source = int(choices[at])
        nth = int(self._before[chunk][source] + ranks[at])
        epoch, block = divmod(nth, self.blocks(source))
        return source, int(self._order(source, epoch)[block]) * self.context

    def batch(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count` of the run."""
        batch = self._read([self.locate(first + i) for i in range(count)])
        if self.noise:
            for index in range(first | 1, first + count, 2):
                self._disturb(batch.tokens[index - first], index)
        return batch

    def held_out(self, source: int) -> Batch | None:
        """The sequences of a source that are never trained on; None where it is too small to spare any."""
        first = self._blocks[source]
        blocks = range(first, first + self._held_out[source])
        return self._read([(source, block * self.context) for block in blocks]) if blocks else None

    def _read(self, places: Sequence[tuple[int, int]]) -> Batch:
        count, span = len(places), self.context + 1
        tokens = np.empty((count, span), np.int64)
        loss = np.empty((count, span), bool)
        document = np.empty((count, span), np.int32)
        for i, (source, start) in enumerate(places):
            store = self._stores[source]
            tokens[i] = store.tokens[start : start + span]
            loss[i] = store.loss[start : start + span] != 0
            place = np.searchsorted(store.offsets, np.arange(start, start + span), side="right")
            document[i] = place - place[0]
        return Batch(tokens, loss, document)

    def _disturb(self, tokens: np.ndarray, index: int) -> None:
        """Puts tokens of the whole vocabulary in the place of some, in sequence `index` of the run."""
        random = _random(self._seed, 1 + len(self._stores), index)
        hit = random.random(len(tokens)) < self.noise
        tokens[hit] = random.integers(self._vocab_size, size=int(hit.sum()))

    def _choices(self, chunk: int) -> np.ndarray:
        draws = _random(self._seed, 0, chunk).random(_CHOICES)
        return np.searchsorted(self._shares, draws, side="right").clip(max=len(self._stores) - 1)

    def _order(self, source: int, epoch: int) -> np.ndarray:
        key = source, epoch
        if key not in self._orders:
            # two epochs of a source overlap within a batch at most
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source or k[1] >= epoch - 1}
            self._orders[key] = _random(self._seed, 1 + source, epoch).permutation(self.blocks(source))
        return self._orders[key]


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def ahead(batches: Iterator[Batch]) -> Generator[Batch]:
    """The same batches, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
