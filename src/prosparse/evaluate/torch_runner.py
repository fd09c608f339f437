"""Scoring with torch, on a GPU or the CPU: many sequences at a time."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prosparse.evaluate.scoring import Progress, Request, Score
from prosparse.model.tokenizer import Tokenizer
from prosparse.sparsify.hf_model import Trunk
from prosparse.sparsify.regularizer import SparsityCounter

_LOGITS = 2**26  # float32 logits that exist at a time: 256 MB, and as much again in the log-softmax
_ROWS = 1024  # sequences at a time: attention kernels have a limit on rows times heads


class TorchRunner:
    """A `scoring.Runner`; `prosparse.evaluate.perplexity` takes it too.

    `n_ctx`: tokens that may be fed. `bfloat16`: products inside the layers under autocast; the head's are
    float32 always, as bfloat16 logits tie. `tokens`: most that are fed at a time, padding included (default:
    65536 on a GPU, 4096 on the CPU).
    """

    def __init__(
        self,
        trunk: Trunk,
        tokenizer: Tokenizer,
        n_ctx: int,
        *,
        bfloat16: bool = False,
        tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        trunk.model.eval()
        self._trunk = trunk
        self._device = trunk.head.device
        self._bfloat16 = bfloat16
        self._tokens = tokens or (65536 if self._device.type == "cuda" else 4096)
        self._counter = SparsityCounter(len(trunk.mlps), self._device)

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """In the order of `requests`; `progress` is called after each batch."""
        scores: list[Score | None] = [None] * len(requests)
        lengths = [len(context) + len(option) - 1 for context, option in requests]
        done = 0
        for batch in batches(lengths, self._tokens):
            parts = [
                (np.array(requests[i].context + requests[i].option), len(requests[i].context) - 1)
                for i in batch
            ]
            logprobs, best = self._run(parts)
            ends = np.cumsum([len(requests[i].option) for i in batch])[:-1]
            for i, of, greedy in zip(batch, np.split(logprobs, ends), np.split(best, ends), strict=True):
                scores[i] = Score(float(of.sum(dtype=np.float64)), bool(greedy.all()))
            done += len(batch)
            if progress is not None:
                progress(done, len(requests))
        return [score for score in scores if score is not None]

    def logprobs(self, token_ids: Sequence[int] | np.ndarray, start: int = 0) -> np.ndarray:
        """float32 [n-1-start]: log p(token[i+1] | tokens up to i) for i from `start` on."""
        n = len(token_ids) - 1
        if not 0 <= start <= n:
            raise ValueError(f"start must be from 0 to {n}, not {start}")
        if n > self.n_ctx:
            raise ValueError(f"{n + 1} tokens were given, the context holds {self.n_ctx}")
        if start == n:
            return np.empty(0, np.float32)
        return self._run([(np.asarray(token_ids), start)])[0]

    def sparsity(self) -> float:
        """Share of zeros in x1 over layers and all tokens fed since the last call, padding aside."""
        share = self._counter.overall()
        self._counter.reset()
        return share

    def _run(self, parts: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
        """float32 and bool [scored], of one (ids, start) after the other: log p of each of ids[start + 1:],
        and whether no other token is likelier."""
        lengths = [len(ids) - 1 for ids, _ in parts]
        width = max(lengths)
        # padding is on the right, where no token of the text can see it
        tokens = np.zeros((len(parts), width), np.int64)
        for row, (ids, _) in zip(tokens, parts, strict=True):
            row[: len(ids) - 1] = ids[:-1]
        places = [width * row + np.arange(n) for row, n in enumerate(lengths)]
        fed = self._tensor(np.concatenate(places))
        scored = self._tensor(
            np.concatenate([place[start:] for place, (_, start) in zip(places, parts, strict=True)])
        )
        targets = self._tensor(np.concatenate([ids[start + 1 :] for ids, start in parts]))
        with torch.inference_mode():
            hidden = self._hidden(self._tensor(tokens), fed)[scored].float()
            head = self._trunk.head.float()
            step = max(1, _LOGITS // len(head))
            logprobs, best = [], []
            for part, target in zip(hidden.split(step), targets.split(step), strict=True):
                logits = part @ head.T
                chosen = logits.gather(1, target[:, None])[:, 0]
                logprobs.append(chosen - logits.logsumexp(1))
                best.append(chosen == logits.amax(1))
            return torch.cat(logprobs).cpu().numpy(), torch.cat(best).cpu().numpy()

    def _hidden(self, tokens: Tensor, fed: Tensor) -> Tensor:
        """[batch * n, d] of `tokens` [batch, n]; x1 is counted at the flat places `fed`."""

        def count(layer: int, x1: Tensor) -> None:
            self._counter.add(layer, x1 if len(fed) == tokens.numel() else x1.flatten(0, 1)[fed])

        before = [mlp.observe for mlp in self._trunk.mlps]
        try:
            for layer, mlp in enumerate(self._trunk.mlps):
                mlp.observe = partial(count, layer)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
                return self._trunk(tokens).flatten(0, 1)
        finally:
            for mlp, observe in zip(self._trunk.mlps, before, strict=True):
                mlp.observe = observe

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self._device)


def batches(lengths: Sequence[int], tokens: int, rows: int = _ROWS) -> Iterator[list[int]]:
    """Indices of sequences of like length: at most `rows`, and `tokens` with padding, if more than one.

    The longest come first, so that what does not fit into memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, min(rows, tokens // lengths[order[start]]))
        yield order[start : start + size]
        start += size
