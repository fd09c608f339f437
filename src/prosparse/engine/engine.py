"""LLM: a loaded model that answers. What `prosparse.load` returns; faces use nothing below it."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from time import perf_counter
from typing import Any, Literal, overload

import numpy as np

from prosparse.engine.backend import (
    backend_classes,
    choose_ctx,
    choose_mode,
    choose_threads,
    core_config,
    is_file_view,
    set_predictors,
)
from prosparse.engine.completion import Chunk, Completion
from prosparse.engine.sampler import Sampler, SamplingParams
from prosparse.engine.stream import TextStream
from prosparse.engine.traffic import Traffic
from prosparse.formats.quants import to_native
from prosparse.model.chat import CHATML, MINICPM, render
from prosparse.model.model import Model, Tensor
from prosparse.model.tokenizer import Tokenizer

log = logging.getLogger("prosparse")

_SAMPLING = SamplingParams()
_TRIALS = 12  # tokens a mode is timed on
_LOGITS_FLOATS = 2**24  # logits that `logprobs` holds at a time: 64 MB


class LLM:
    """A model ready to run on the CPU.

    `n_ctx`: context in tokens (default 4096, or less if the model was trained for less). `n_threads`: default
    one per usable core. `mode`: "exact" skips inactive neurons and gives the same result as "dense";
    "predicted" computes, of a decoded token, only the neurons that the model's predictors name, which may
    miss some; `recall` is the share of active neurons they are to find (default: the file's). "auto" takes
    exact where the activation has exact zeros, and with a `recall` whichever of exact and predicted is faster
    here. `backend`: "cpu", or "naive" (numpy, for tests).
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        mode: str = "auto",
        recall: float | None = None,
        backend: str = "cpu",
    ) -> None:
        self.config = model.config
        self.name = model.name
        self.n_ctx = choose_ctx(model.config, n_ctx)
        self.mode, self._mode_reason = choose_mode(model, mode, recall)
        self.recall: float | None = None
        model_class, self._cache_class = backend_classes(backend)
        self._tokenizer_data = model.tokenizer
        self._core = model_class(core_config(model.config), choose_threads(n_threads), self.mode)
        self.traffic = self._set_tensors(model.tensors)
        if self.mode == "predicted":
            assert model.predictors is not None, "choose_mode has seen to it"
            self.recall = model.predictors.default if recall is None else recall
            set_predictors(self._core, model, self.recall)
        self._core.finish()
        if self.mode == "predicted" and mode == "auto":
            self._keep_the_faster()

    def _keep_the_faster(self) -> None:
        """Predicted mode stays only where it is faster than exact mode, both measured now, in turns."""
        seconds: dict[bool, list[float]] = {True: [], False: []}
        cache = self.new_cache(2)
        token = np.zeros(1, np.int32)
        self._core.forward(cache, token, False)
        for _ in range(_TRIALS):
            for predicting, times in seconds.items():
                self._core.predicting = predicting
                cache.truncate(1)
                start = perf_counter()
                self._core.forward(cache, token, False)
                times.append(perf_counter() - start)
        gain = float(np.median(seconds[False]) / np.median(seconds[True]))
        self._core.reset_stats()
        self._core.predicting = gain > 1
        self.mode = "predicted" if gain > 1 else "exact"
        self._mode_reason = f"measured {gain:.2f} times as fast predicted as exact"

    def _set_tensors(self, tensors: Mapping[str, Tensor]) -> Traffic:
        nbytes: dict[str, int] = {}
        repacked: Counter[str] = Counter()
        for name, tensor in tensors.items():
            native = to_native(tensor)
            if native.type != tensor.type:
                repacked[f"{tensor.type} as {native.type}"] += 1
            data = native.data
            self._core.set_tensor(name, native.type, native.shape, data, is_file_view(data))
            nbytes[name] = data.nbytes
        if repacked:
            kinds = ", ".join(f"{count} tensors of {kind}" for kind, count in repacked.items())
            log.warning("%s: repacked %s", self.name, kinds)
        return Traffic.of(nbytes, self.config.vocab_size)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer; ValueError if the file has none."""
        return Tokenizer.build(self._tokenizer_data, self.config.bos_token_id, self.config.eos_token_ids)

    @property
    def chat_template(self) -> str | None:
        """Jinja source; None if the model names none, then `chat` uses ChatML."""
        template = self.tokenizer.chat_template
        # published MiniCPM files lack the template that all of them were trained with
        if template is None and self.config.architecture == "minicpm":
            return MINICPM
        return template

    @property
    def n_threads(self) -> int:
        return self._core.n_threads

    @n_threads.setter
    def n_threads(self, n: int) -> None:
        self._core.n_threads = n

    @property
    def mode_reason(self) -> str:
        """The mode that runs and why, in one line."""
        if self.mode == "exact" and not self._core.skipping:
            return "dense: so many neurons are active that skipping the others would cost time"
        if self.mode == "predicted":
            return f"predicted, recall {self.recall:g}: {self._mode_reason}"
        return f"{self.mode}: {self._mode_reason}"

    def new_cache(self, n_ctx: int | None = None) -> Any:
        """An empty KV cache for `forward`, of the model's context length unless told."""
        return self._cache_class(self._core, self.n_ctx if n_ctx is None else n_ctx)

    def forward(
        self, tokens: Sequence[int] | np.ndarray, cache: Any = None, all_logits: bool = False
    ) -> np.ndarray:
        """float32 logits [1, vocab] of the last token, or [n, vocab]; appends to `cache`, or to a new one.

        One token is decoding, more are prefill.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        cache = self.new_cache(max(ids.size, 1)) if cache is None else cache
        return self._core.forward(cache, ids, all_logits)

    def stats(self) -> dict[str, int]:
        """Counters since the last `reset_stats`: see `NaiveModel.stats`."""
        return self._core.stats()

    def reset_stats(self) -> None:
        self._core.reset_stats()

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = ...,
        sampling: SamplingParams = ...,
        stop: Sequence[str] = ...,
        stream: Literal[False] = ...,
        context: "Context | None" = ...,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = ...,
        sampling: SamplingParams = ...,
        stop: Sequence[str] = ...,
        stream: Literal[True],
        context: "Context | None" = ...,
    ) -> Iterator[Chunk]: ...
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        sampling: SamplingParams = _SAMPLING,
        stop: Sequence[str] = (),
        stream: bool = False,
        context: "Context | None" = None,
    ) -> Completion | Iterator[Chunk]:
        """Continues a text (BOS is added as the model was trained) or token ids (taken as they are).

        Ends at an end-of-turn token or a `stop` string (finish_reason "stop"), or after `max_tokens`
        (-1: no limit) or at a full context ("length"). With `stream`, chunks come as they are made. A
        `context` keeps its tokens between calls, so a prompt that begins alike is not computed again.
        """
        ids = self.tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt is empty")
        if len(ids) > self.n_ctx:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context holds {self.n_ctx}: raise n_ctx (-c)"
            )
        if max_tokens < -1:
            raise ValueError(f"max_tokens must be at least 0, or -1 for no limit, not {max_tokens}")
        # the last token is never fed back, so it needs no room
        room = self.n_ctx - len(ids) + 1
        limit = room if max_tokens == -1 else min(max_tokens, room)
        context = Context(self, len(ids) + limit) if context is None else context
        chunks = self._chunks(ids, limit, Sampler(sampling), TextStream(stop), context)
        if stream:
            return chunks
        *_, last = chunks
        assert last.completion is not None, "the last chunk carries the completion"
        return last.completion

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """The assistant's answer to `messages`, by the model's own template; options as in `generate`."""
        return self.generate(self.chat_ids(messages), **options)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers."""
        tokenizer = self.tokenizer
        text = render(
            self.chat_template or CHATML,
            messages,
            bos_token=tokenizer.token_text(tokenizer.bos_id),
            eos_token=tokenizer.token_text(next(iter(self.config.eos_token_ids), None)),
        )
        return tokenizer.encode(text, special=True)

    def _chunks(
        self, ids: list[int], limit: int, sampler: Sampler, text: TextStream, context: "Context"
    ) -> Iterator[Chunk]:
        eos_ids, token_bytes = self.tokenizer.eos_ids, self.tokenizer.token_bytes
        history, pieces = list(ids), []
        finish_reason: Literal["stop", "length"] = "length"
        start = perf_counter()
        n_computed = context.start(ids)
        prompt_seconds = perf_counter() - start
        before = self.stats()

        seconds, start = 0.0, perf_counter()
        while len(history) < len(ids) + limit:
            token = sampler.sample(context.logits, history)
            if token in eos_ids:
                finish_reason = "stop"
                break
            history.append(token)
            if piece := text.push(token_bytes(token)):
                seconds += perf_counter() - start
                pieces.append(piece)
                yield Chunk(piece)
                start = perf_counter()
            if text.stopped is not None:
                finish_reason = "stop"
                break
            if len(history) < len(ids) + limit:
                context.append(token)
        seconds += perf_counter() - start

        if rest := text.finish():
            pieces.append(rest)
        spent = {key: value - before[key] for key, value in self.stats().items()}
        steps = len(context.ids) - len(ids)
        completion = Completion(
            text="".join(pieces),
            token_ids=history[len(ids) :],
            n_prompt=len(ids),
            n_gen=len(history) - len(ids),
            prompt_tok_s=n_computed / prompt_seconds,
            gen_tok_s=steps / seconds if steps else 0.0,
            sparsity=1 - spent["active"] / spent["neurons"] if steps else 0.0,
            bytes_per_token=spent["weight_bytes_read"] // spent["tokens"] if steps else 0,
            mode=self.mode,
            finish_reason=finish_reason,
        )
        yield Chunk(rest, completion)

    def logprobs(self, token_ids: Sequence[int] | np.ndarray, start: int = 0) -> np.ndarray:
        """float32 [n-1-start]: log p(token[i+1] | tokens up to i) for i from `start` on.

        The logits of a few hundred tokens at most are in memory at a time.
        """
        ids = np.ascontiguousarray(token_ids, np.int32)
        n = ids.size - 1
        if not 0 <= start <= n:
            raise ValueError(f"start must be from 0 to {n}, not {start}")
        if n > self.n_ctx:
            raise ValueError(f"{ids.size} tokens were given, the context holds {self.n_ctx}: raise n_ctx")
        out = np.empty(n - start, np.float32)
        cache = self.new_cache(max(n, 1))
        if start:
            self._core.forward(cache, ids[:start], False)
        step = max(1, min(512, _LOGITS_FLOATS // self.config.vocab_size))
        if self.mode == "predicted":
            step = 1  # prompts are not predicted, and it is predictions that are to be judged
        for a in range(start, n, step):
            b = min(a + step, n)
            logits = self._core.forward(cache, ids[a:b], True)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(b - a), ids[a + 1 : b + 1]]
            total = np.exp(logits, out=logits).sum(axis=1, dtype=np.float64)
            out[a - start : b - start] = chosen - np.log(total)
        return out


class Context:
    """A KV cache and the tokens in it. Prompts that begin with the same tokens reuse their part."""

    def __init__(self, llm: LLM, n_ctx: int | None = None) -> None:
        self.ids: list[int] = []
        self.logits = np.empty(0, np.float32)  # [vocab], of the last token
        self._cache = llm.new_cache(n_ctx)
        self._forward = llm._core.forward
        self._token = np.empty(1, np.int32)

    def start(self, ids: list[int]) -> int:
        """Makes the context hold exactly `ids`; how many of them had to be computed."""
        # at least the last one, for its logits
        shared = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids[:-1], strict=False))
        )
        self._cache.truncate(shared)
        del self.ids[shared:]
        self.logits = self._forward(self._cache, np.array(ids[shared:], np.int32), False)[0]
        self.ids += ids[shared:]
        return len(ids) - shared

    def append(self, token: int) -> None:
        """Decodes one token."""
        self._token[0] = token
        self.logits = self._forward(self._cache, self._token, False)[0]
        self.ids.append(token)
