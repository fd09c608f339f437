"""The plain twin of the runners: one option at a time, in float32, with a whole log-softmax. For tests."""

from collections.abc import Sequence

import numpy as np
import torch

from prosparse.evaluate.scoring import Progress, Request, Score
from prosparse.model.tokenizer import Tokenizer
from prosparse.sparsify.hf_model import Trunk


class NaiveRunner:
    """A `scoring.Runner` without batches, chunks or anything else that is clever."""

    def __init__(self, trunk: Trunk, tokenizer: Tokenizer, n_ctx: int) -> None:
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self._trunk = trunk

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        scores = []
        for context, option in requests:
            table = self._log_softmax([*context, *option])
            places = range(len(context) - 1, len(context) + len(option) - 1)
            logprobs = [float(table[place, token]) for place, token in zip(places, option, strict=True)]
            greedy = [
                float(table[place].max()) == logprob for place, logprob in zip(places, logprobs, strict=True)
            ]
            scores.append(Score(sum(logprobs), all(greedy)))
        return scores

    def logprobs(self, token_ids: Sequence[int], start: int = 0) -> np.ndarray:
        table = self._log_softmax(list(token_ids))
        return np.array([table[i, token_ids[i + 1]] for i in range(start, len(table))], np.float32)

    def _log_softmax(self, ids: list[int]) -> np.ndarray:
        """float32 [n-1, vocab]: of what follows each token but the last."""
        with torch.no_grad():
            hidden = self._trunk(torch.tensor([ids[:-1]], device=self._trunk.head.device))
            table = torch.log_softmax(hidden[0].float() @ self._trunk.head.float().T, -1)
        return np.asarray(table.cpu())
