"""The systems compared, behind one small interface, each in a process of its own.

Every runner offers `decode(tokens)`, seconds of each token from an empty cache; `prefill(tokens)`, seconds of
one batch from an empty cache; `set_threads(n)`; and `facts()`, what a table should say about it. Tokens are
given, never sampled: all systems do the same work, and no rival pays for Python between two tokens.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

N_CTX = 1024
MAX_BATCH = 512
T = TypeVar("T")


def _seconds_each(step: Callable[[T], object], inputs: Iterable[T]) -> list[float]:
    """Seconds of each step; a step's time ends where the next one's begins."""
    times = [perf_counter()]
    for value in inputs:
        step(value)
        times.append(perf_counter())
    return [after - before for before, after in pairwise(times)]


class LlamaCpp:
    """llama.cpp's bare decode loop, with its own repacking and the better of its two attention settings."""

    def __init__(self, path: Path, n_threads: int) -> None:
        from llama_cpp import llama_cpp as lib

        self._lib = lib
        # the library keeps only the address
        self._silence = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._silence, None)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self._n_threads = n_threads
        self._flash = min((self._trial(flash), flash) for flash in (False, True))[1]
        self._context = self._new_context(self._flash)

    def _new_context(self, flash: bool) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = N_CTX
        params.n_batch = params.n_ubatch = MAX_BATCH
        params.n_threads = params.n_threads_batch = self._n_threads
        params.flash_attn_type = int(flash)
        params.no_perf = True
        context = self._lib.llama_init_from_model(self._model, params)
        assert context
        return context

    def _trial(self, flash: bool) -> float:
        """Median seconds a token; the first tokens also page the file in."""
        self._context = self._new_context(flash)
        seconds = statistics.median(self.decode(range(3, 3 + 32))[8:])
        self._lib.llama_free(self._context)
        return seconds

    def _batch(self, tokens: Sequence[int]) -> Any:
        array = (self._lib.llama_token * len(tokens))(*tokens)
        return self._lib.llama_batch_get_one(array, len(tokens)), array

    def _run(self, batch: Any) -> None:
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self._lib.llama_get_logits(self._context)  # waits for the result

    def decode(self, tokens: Sequence[int]) -> list[float]:
        self._clear()
        batches = [self._batch([token]) for token in tokens]
        return _seconds_each(lambda batch: self._run(batch[0]), batches)

    def prefill(self, tokens: Sequence[int]) -> float:
        self._clear()
        batch, _array = self._batch(tokens)
        return _seconds_each(self._run, [batch])[0]

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def set_threads(self, n: int) -> None:
        self._lib.llama_set_n_threads(self._context, n, n)

    def facts(self) -> dict[str, Any]:
        import llama_cpp

        return {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "flash_attention": self._flash,
            "build": self._lib.llama_print_system_info().decode().strip(),
        }


class Prosparse:
    """This project's engine; `mode` is "exact" or "dense"."""

    def __init__(self, path: Path, n_threads: int, mode: str, **activation: Any) -> None:
        import prosparse

        self._llm = prosparse.load(path, n_ctx=N_CTX, n_threads=n_threads, mode=mode, **activation)
        self._cache = self._llm.new_cache()
        self.decode(range(3, 3 + 8))

    def decode(self, tokens: Sequence[int]) -> list[float]:
        self._cache.truncate(0)
        self._llm.reset_stats()
        return _seconds_each(lambda token: self._llm.forward([token], self._cache), tokens)

    def prefill(self, tokens: Sequence[int]) -> float:
        self._cache.truncate(0)
        return _seconds_each(lambda batch: self._llm.forward(batch, self._cache), [tokens])[0]

    def set_threads(self, n: int) -> None:
        self._llm.n_threads = n

    def facts(self) -> dict[str, Any]:
        """Sparsity and bytes are those of the last `decode`."""
        import prosparse
        from prosparse import _core

        stats = self._llm.stats()
        return {
            "version": f"prosparse {prosparse.__version__}",
            "isa": _core.isa(),
            "mode": self._llm.mode_reason,
            "sparsity": 1 - stats["active"] / stats["neurons"],
            "bytes_per_token": stats["weight_bytes_read"] / stats["tokens"],
        }

    def bandwidth(self, n_threads: int) -> float:
        """GB/s these cores read from memory."""
        from prosparse import _core

        return _core.bandwidth(n_threads)


class TorchBf16:
    """Hugging Face transformers on PyTorch: the same shape with random bfloat16 weights."""

    def __init__(self, path: Path, n_threads: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from prosparse.formats import open_model

        self._torch = torch
        self.set_threads(n_threads)
        hf = open_model(path).config.to_hf() | {"hidden_act": "silu", "dtype": "bfloat16"}
        config = LlamaConfig(**hf)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        self._model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(default)
        self.decode(range(3, 3 + 4))

    def _run(self, tokens: Sequence[int]) -> None:
        ids = self._torch.tensor([list(tokens)])
        with self._torch.inference_mode():
            self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=1)

    def decode(self, tokens: Sequence[int]) -> list[float]:
        self._clear()
        return _seconds_each(lambda token: self._run([token]), tokens)

    def prefill(self, tokens: Sequence[int]) -> float:
        self._clear()
        return _seconds_each(self._run, [tokens])[0]

    def _clear(self) -> None:
        """A growing cache: as fast as a static one a token, and faster in prefill."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def set_threads(self, n: int) -> None:
        self._torch.set_num_threads(n)

    def facts(self) -> dict[str, Any]:
        return {"version": f"PyTorch {self._torch.__version__}, bfloat16"}


class Process:
    """A runner in a process of its own: memory and threads of two systems never mix.

    `process.call("decode", tokens)` runs the method there; what it raises is raised here.
    """

    def __init__(self, runner: type, **arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, runner, arguments), daemon=True)
        self._process.start()
        there.close()
        self._receive()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            result, error = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the system's process ended with code {self._process.exitcode}") from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, runner: type, arguments: dict[str, Any]) -> None:
    """Builds the runner, then answers calls until the other end closes."""
    try:
        instance = runner(**arguments)
        pipe.send((None, None))
        while True:
            method, call_arguments = pipe.recv()
            pipe.send((getattr(instance, method)(*call_arguments), None))
    except EOFError:
        return
    except Exception as error:
        pipe.send((None, error))
