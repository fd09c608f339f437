"""`prosparse perplexity`: how surprised a model is by a text, counted as llama-perplexity does."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from prosparse import options
from prosparse.evaluate.scoring import mean

if TYPE_CHECKING:
    import numpy as np

    from prosparse.model.tokenizer import Tokenizer


class LanguageModel(Protocol):
    """What perplexity asks of a model: an `LLM`, or a runner of `prosparse eval`."""

    @property
    def tokenizer(self) -> "Tokenizer": ...
    def logprobs(self, token_ids: Sequence[int], start: int = 0) -> "np.ndarray": ...


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of a text; `stderr` is the standard error of `ppl`, token losses taken as independent."""

    ppl: float
    stderr: float
    nll: float  # mean, nats per token
    n_tokens: int  # scored
    n_chunks: int
    ctx: int  # tokens per chunk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Perplexity of a text with its standard error, as llama-perplexity counts it: the text is cut into "
        "chunks of -c tokens that do not overlap and know nothing of each other, each starts with BOS if the "
        "model uses one, and only the second half of each chunk is scored. A last, shorter chunk is left out."
    )
    options.add_model(parser, ctx=False)
    parser.add_argument(
        "-f", "--file", type=Path, required=True, metavar="FILE", help="text to measure on, UTF-8"
    )
    parser.add_argument("-c", "--ctx-size", type=int, default=512, metavar="N", help="tokens per chunk [512]")
    parser.add_argument("--chunks", type=int, metavar="N", help="use only the first N chunks [all]")


def main(args: argparse.Namespace) -> int:
    text = args.file.read_bytes()
    llm = options.load(args)
    start = perf_counter()

    def show(chunk: int, n_chunks: int, ppl: float) -> None:
        end = "\n" if chunk == n_chunks else "\r"
        print(f"chunk {chunk}/{n_chunks}  perplexity so far {ppl:.4f} ", end=end, file=sys.stderr, flush=True)

    result = perplexity(llm, llm.tokenizer.encode(text, add_bos=False), args.ctx_size, args.chunks, show)
    seconds = perf_counter() - start
    stats = llm.stats()
    sparsity = 1 - stats["prefill_active"] / stats["prefill_neurons"]
    print(
        f"perplexity {result.ppl:.4f} ± {result.stderr:.4f}  "
        f"({result.n_tokens} tokens: the second half of {result.n_chunks} chunks of {result.ctx}; "
        f"{llm.mode} mode, sparsity {sparsity:.1%}, {result.n_chunks * result.ctx / seconds:.0f} tok/s)"
    )
    if args.json:
        options.print_json(asdict(result) | {"mode": llm.mode, "sparsity": sparsity, "seconds": seconds})
    return 0


def perplexity(
    llm: LanguageModel,
    ids: Sequence[int],
    ctx: int = 512,
    n_chunks: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Of a text's token ids, without BOS. ValueError if they do not fill one chunk.

    `progress(chunk, n_chunks, ppl)` is called after each chunk.
    """
    if ctx < 4:
        raise ValueError(f"chunks need at least 4 tokens, not {ctx}")
    if n_chunks is not None and n_chunks < 1:
        raise ValueError(f"chunks must be at least 1, not {n_chunks}")
    tokenizer = llm.tokenizer
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = [*bos, *ids]
    available = len(ids) // ctx
    if not available:
        raise ValueError(
            f"the text has {len(ids)} tokens, one chunk needs {ctx}: give more text or a smaller -c"
        )
    n_chunks = min(available, n_chunks or available)
    losses: list[float] = []
    for i in range(n_chunks):
        chunk = ids[i * ctx : (i + 1) * ctx]
        # BOS takes the place of the chunk's first token, which is never scored
        chunk[: len(bos)] = bos
        losses += (-llm.logprobs(chunk, start=ctx // 2)).tolist()
        if progress:
            progress(i + 1, n_chunks, math.exp(math.fsum(losses) / len(losses)))
    nll, stderr = mean(losses)
    ppl = math.exp(nll)
    return Perplexity(ppl, ppl * stderr, nll, len(losses), n_chunks, ctx)
