"""From items to accuracies: every option is scored by its log-probability, log P(option | context)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from prosparse.evaluate.tasks.reading import Item
from prosparse.model.tokenizer import Tokenizer

Progress = Callable[[int, int], None]  # (done, of)


class Request(NamedTuple):
    """Token ids, neither empty; BOS, where the model uses one, is the first of `context`."""

    context: tuple[int, ...]
    option: tuple[int, ...]


class Score(NamedTuple):
    """`logprob`: log P(option | context), nats. `greedy`: at no token of it was another one likelier."""

    logprob: float
    greedy: bool


class Runner(Protocol):
    """What evaluation asks of a model, whatever runs it."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def n_ctx(self) -> int: ...  # tokens it can be fed
    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]: ...
    def logprobs(self, token_ids: Sequence[int], start: int = 0) -> np.ndarray: ...  # as `LLM.logprobs`


@dataclass(frozen=True, slots=True)
class Result:
    """Of one benchmark. `acc` takes the option with the greatest log-probability, `acc_norm` the one with the
    greatest per character; with single options `acc` is the share that greedy decoding says, and `ppl` is
    exp of their mean negative log-probability. Errors are standard errors."""

    n: int  # items
    cut: int  # requests that were cut on the left to fit the context
    acc: float
    acc_stderr: float
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    ppl: float | None = None
    ppl_stderr: float | None = None


def evaluate(items: Sequence[Item], runner: Runner, progress: Progress | None = None) -> Result:
    """All `items` on one runner. ValueError if there are none, or for an option that cannot be scored."""
    if not items:
        raise ValueError("there are no items to evaluate")
    requests, cut = encode(items, runner.tokenizer, runner.n_ctx)
    # options that are alike get one score, so that no rounding chooses between them
    unique = list(dict.fromkeys(requests))
    scores = dict(zip(unique, runner.score(unique, progress), strict=True))
    if not all(math.isfinite(score.logprob) for score in scores.values()):
        raise ValueError("log-probabilities are not finite: the model's weights are broken")
    found = [scores[request] for request in requests]
    return result(items, found, cut)


def encode(items: Sequence[Item], tokenizer: Tokenizer, n_ctx: int) -> tuple[list[Request], int]:
    """One request a pair, in order, and how many were cut to fit a context of `n_ctx` tokens."""
    requests, cut = [], 0
    for item in items:
        for context, option in item.pairs:
            request = split(tokenizer, context, " " + option)
            # the last token is never fed
            too_many = len(request.context) + len(request.option) - 1 - n_ctx
            if too_many > 0:
                request = _cut(request, too_many, tokenizer)
                cut += 1
            requests.append(request)
    return requests, cut


def split(tokenizer: Tokenizer, context: str, option: str) -> Request:
    """Tokens of `context` alone, and those that the whole text has beyond as many, as lm-evaluation-harness
    does. White space at the end of the context belongs to the option. ValueError where nothing is left.

    Of an empty context the model sees BOS, even if it is not used to one.
    """
    stripped = context.rstrip()
    before = tokenizer.encode(stripped)
    whole = tokenizer.encode(context + option)
    if not before:
        if tokenizer.bos_id is None:
            raise ValueError(
                f"{option!r} has no context, and the model has no BOS token to stand for one: "
                "remove this item from the data"
            )
        before, whole = [tokenizer.bos_id], [tokenizer.bos_id, *whole]
    if len(whole) <= len(before):
        raise ValueError(f"no token of {context + option!r} belongs to {option!r}: remove it from the data")
    return Request(tuple(before), tuple(whole[len(before) :]))


def _cut(request: Request, too_many: int, tokenizer: Tokenizer) -> Request:
    """Without `too_many` tokens of the context, BOS aside."""
    bos = 1 if tokenizer.add_bos else 0
    kept = request.context[bos + too_many :]
    if not kept:
        raise ValueError(
            f"an option of {len(request.option)} tokens leaves no room for its question: the context holds "
            f"{len(request.context) + len(request.option) - 1 - too_many} tokens"
        )
    return Request(request.context[:bos] + kept, request.option)


def result(items: Sequence[Item], scores: Sequence[Score], cut: int = 0) -> Result:
    """`scores` of all pairs, in the order of items. The first of equally good options is chosen."""
    right, right_norm = [], []
    start = 0
    for item in items:
        mine = scores[start : start + len(item.pairs)]
        start += len(item.pairs)
        if len(item.pairs) == 1:
            right.append(mine[0].greedy)
            continue
        logprobs = np.array([score.logprob for score in mine])
        lengths = np.array([max(len(option), 1) for _, option in item.pairs])
        right.append(int(logprobs.argmax()) == item.gold)
        right_norm.append(int((logprobs / lengths).argmax()) == item.gold)
    acc, acc_stderr = mean(right)
    if right_norm:
        return Result(len(items), cut, acc, acc_stderr, *mean(right_norm))
    loss, loss_stderr = mean([-score.logprob for score in scores])
    ppl = math.exp(min(loss, 700.0))  # a hopeless model's is beyond what a float holds
    return Result(len(items), cut, acc, acc_stderr, ppl=ppl, ppl_stderr=ppl * loss_stderr)


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (0 for a single value)."""
    n = len(values)
    middle = math.fsum(values) / n
    variance = math.fsum((value - middle) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
    return middle, math.sqrt(variance / n)
