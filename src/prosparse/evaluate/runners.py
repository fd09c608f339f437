"""Runners for `scoring`: the CPU engine, and whichever of engine and torch a command line asks for."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prosparse.evaluate import scoring
from prosparse.evaluate.scoring import Progress, Request, Score

if TYPE_CHECKING:
    from prosparse.engine.engine import LLM
    from prosparse.model.model import Model
    from prosparse.model.tokenizer import Tokenizer

_LOGITS = 2**24  # float32 logits that exist at a time: 64 MB


class MeasuringRunner(scoring.Runner, Protocol):
    """A runner that also counts."""

    def sparsity(self) -> float: ...  # share of inactive neurons over layers and tokens since the last call


class EngineRunner:
    """A `scoring.Runner` of the CPU engine. What a request has in common with the one before it, such as the
    question of another option, is computed once."""

    def __init__(self, llm: "LLM") -> None:
        self.llm = llm
        self.n_ctx = llm.n_ctx

    @property
    def tokenizer(self) -> "Tokenizer":
        return self.llm.tokenizer

    def score(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Score]:
        """In the order of `requests`; `progress` is called after each."""
        cache = self.llm.new_cache(max((len(c) + len(o) - 1 for c, o in requests), default=1))
        held: tuple[int, ...] = ()  # what is in the cache
        scores = []
        for number, (context, option) in enumerate(requests, 1):
            first = len(context) - 1  # the last token of the context predicts the first of the option
            shared = _shared(held, context[:first])
            cache.truncate(shared)
            if shared < first:
                self.llm.forward(context[shared:first], cache)
            scores.append(self._score(cache, context[first], option))
            held = context + option[:-1]
            if progress is not None:
                progress(number, len(requests))
        return scores

    def logprobs(self, token_ids: Sequence[int], start: int = 0) -> np.ndarray:
        """As `LLM.logprobs`."""
        return self.llm.logprobs(token_ids, start)

    def sparsity(self) -> float:
        """Share of inactive neurons over layers and tokens computed since the last call."""
        stats = self.llm.stats()
        self.llm.reset_stats()
        neurons = stats["neurons"] + stats["prefill_neurons"]
        return 1 - (stats["active"] + stats["prefill_active"]) / max(neurons, 1)

    def _score(self, cache: object, last: int, option: tuple[int, ...]) -> Score:
        """`cache` holds the context but for its `last` token."""
        fed = (last, *option[:-1])
        step = max(1, _LOGITS // self.llm.config.vocab_size)
        if self.llm.mode == "predicted":
            step = 1  # prompts are not predicted, and it is predictions that are to be judged
        total, greedy = 0.0, True
        for a in range(0, len(fed), step):
            logits = self.llm.forward(fed[a : a + step], cache, all_logits=True)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(logits)), option[a : a + step]]
            greedy &= bool((chosen == 0).all())
            total += float((chosen - np.log(np.exp(logits).sum(axis=1, dtype=np.float64))).sum())
        return Score(total, greedy)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def open_model(args: argparse.Namespace) -> "Model":
    """The model of `options.add_model`'s options, with the activation that they ask for."""
    from prosparse.formats import open_model
    from prosparse.model.activation import Activation

    model = open_model(args.model)
    if args.hidden_act is None and args.hidden_act_param is None:
        return model
    activation = Activation.parse(args.hidden_act or model.config.activation.name, args.hidden_act_param)
    return replace(model, config=replace(model.config, activation=activation))


def load(args: argparse.Namespace, model: "Model") -> tuple[MeasuringRunner, str]:
    """`model` on torch where there is a `--device`, or else on the CPU engine; and what runs it, in words."""
    if args.device is not None:
        return _torch(args, model)
    from prosparse.engine.engine import LLM

    llm = LLM(model, n_threads=args.threads, mode=args.mode, recall=args.recall)
    recall = "" if llm.recall is None else f", recall {llm.recall:g}"
    return EngineRunner(llm), f"engine, {llm.mode} mode{recall}"


def _torch(args: argparse.Namespace, model: "Model") -> tuple[MeasuringRunner, str]:
    from prosparse.engine.backend import choose_ctx
    from prosparse.model.tokenizer import Tokenizer
    from prosparse.sparsify import measure

    for name, given in {"--mode": args.mode != "auto", "--recall": args.recall is not None}.items():
        if given:
            raise ValueError(f"{name} is of the CPU engine: leave out {name} or --device")
    trunk, bfloat16 = measure.load(model, args.device)
    # after measure.load, which says what to do where there is no torch
    import torch

    from prosparse.evaluate.torch_runner import TorchRunner

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads must be at least 1, not {args.threads}")
        torch.set_num_threads(args.threads)
    config = model.config
    tokenizer = Tokenizer.build(model.tokenizer, config.bos_token_id, config.eos_token_ids)
    runner = TorchRunner(trunk, tokenizer, choose_ctx(config, None), bfloat16=bfloat16)
    return runner, f"torch, {trunk.head.device.type}, {'bfloat16' if bfloat16 else 'float32'}"
