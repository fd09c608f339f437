"""`prosparse bench`: prefill and decoding speed of a model, and how much of the memory bus decoding uses."""

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prosparse.engine.engine import LLM
    from prosparse.model.tokenizer import Tokenizer

# Real text: how many neurons are active depends on it, so random ids would give a speed that no reader gets.
_TEXT = """\
The lighthouse keeper kept two books. In the first he wrote what the rules asked for: the hour he lit the
lamp, the hour he put it out, the oil it burned, and the wind. In the second he wrote down everything else.
On the third of March a heron stood on the rocks from noon until dusk and did not move. On the ninth a boat
with red sails passed so close that he could hear its crew argue about the price of herring. He never showed
the second book to anyone, and when the inspector came each spring he read the first one, nodded, counted
the barrels twice, and went home again. How much of this was true? 17 barrels, 4 lamps, 365 nights; the sums
were always right, at least.
"""


def sample_tokens(tokenizer: "Tokenizer", n: int) -> list[int]:
    """`n` token ids of plain English prose, repeated as often as needed."""
    return list(itertools.islice(itertools.cycle(tokenizer.encode(_TEXT, add_bos=False)), n))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", required=True, help="GGUF file, HF folder, Hub id, demo, demo-original"
    )
    parser.add_argument("-p", "--n-prompt", type=int, default=512, help="tokens of prefill, 0 for none")
    parser.add_argument("-n", "--n-gen", type=int, default=128, help="tokens to decode, 0 for none")
    parser.add_argument("-t", "--threads", type=int, help="default: one per usable core")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument(
        "--mode",
        help="a list of exact, dense and predicted (default: what the activation and the file allow)",
    )
    parser.add_argument("--recall", type=float, metavar="R", help="of predicted mode [the file's]")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def main(args: argparse.Namespace) -> int:
    modes = args.mode.split(",") if args.mode else None
    result = bench(args.model, args.n_prompt, args.n_gen, args.repetitions, modes, args.threads, args.recall)
    print(
        f"{result['model']}, {result['isa']}, {result['threads']} threads, "
        f"memory reads {result['bandwidth_gb_s']:.1f} GB/s"
    )
    print(f"{'mode':<11}{'test':<8}{'tokens/s':>18}{'inactive':>10}{'GB/s':>8}{'of measured':>13}")
    for row in result["rows"]:
        print(f"{row['mode']:<11}{row['test']:<8}{row['tok_s']:>10.2f} ± {row['sd']:<5.2f}", end="")
        if "gb_s" in row:
            print(f"{row['sparsity']:>10.1%}{row['gb_s']:>8.1f}{row['bandwidth_share']:>13.0%}", end="")
        if "predicted_sparsity" in row:
            print(f"   {row['predicted_sparsity']:.1%} of the gates not read", end="")
        print()
    if args.json:
        print(json.dumps(result))
    return 0


def bench(
    path: str,
    n_prompt: int = 512,
    n_gen: int = 128,
    repetitions: int = 5,
    modes: Sequence[str] | None = None,
    n_threads: int | None = None,
    recall: float | None = None,
) -> dict[str, Any]:
    """One row a mode and test, after a warm-up; the modes take turns, so that all meet the same machine.

    Bandwidths in GB/s (1e9 bytes) and shares of them count the weights read, not the KV cache.
    """
    if n_prompt < 0 or n_gen < 0 or n_prompt + n_gen == 0:
        raise ValueError("-p and -n must not be negative, and one of them must be positive")
    if repetitions < 1:
        raise ValueError("-r must be at least 1")
    from prosparse import _core
    from prosparse.engine.engine import LLM
    from prosparse.formats import open_model

    model = open_model(path)
    if modes is None:
        modes = ("exact", "dense") if model.config.activation.sparse else ("dense",)
        modes = ("predicted", *modes) if model.predictors else modes
    n_ctx = max(n_prompt, n_gen)
    recalls = {mode: recall if mode == "predicted" else None for mode in modes}
    llms = {
        mode: LLM(model, n_ctx=n_ctx, n_threads=n_threads, mode=mode, recall=recalls[mode]) for mode in modes
    }
    threads = llms[modes[0]].n_threads
    tokens = sample_tokens(llms[modes[0]].tokenizer, n_ctx)
    tests = {f"pp{n_prompt}": (_prefill, tokens[:n_prompt]), f"tg{n_gen}": (_decode, tokens[:n_gen])}
    bandwidth = _core.bandwidth(threads)
    speeds = defaultdict(list)
    for repetition in range(repetitions + 1):
        for mode, llm in llms.items():
            for test, (run, ids) in tests.items():
                if ids:
                    speeds[mode, test].append(len(ids) / run(llm, ids))
        if repetition == 0:
            # it paged the weights in and woke the clocks
            speeds.clear()
            for llm in llms.values():
                llm.reset_stats()
    bandwidth = max(bandwidth, _core.bandwidth(threads))

    rows = []
    for (mode, test), values in speeds.items():
        mean = statistics.mean(values)
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        row = {"mode": mode, "test": test, "tok_s": mean, "sd": sd}
        if tests[test][0] is _decode:
            stats = llms[mode].stats()
            gb_s = stats["weight_bytes_read"] / stats["tokens"] * mean / 1e9
            row |= {"gb_s": gb_s, "bandwidth_share": gb_s / bandwidth}
            row["sparsity"] = 1 - stats["active"] / stats["neurons"]
            if mode == "predicted":
                row["predicted_sparsity"] = 1 - stats["candidates"] / stats["neurons"]
        rows.append(row)
    return {
        "model": model.name,
        "isa": _core.isa(),
        "threads": threads,
        "bandwidth_gb_s": bandwidth,
        "rows": rows,
    }


def _prefill(llm: "LLM", ids: Sequence[int]) -> float:
    """Seconds."""
    cache = llm.new_cache()
    start = perf_counter()
    llm.forward(ids, cache)
    return perf_counter() - start


def _decode(llm: "LLM", ids: Sequence[int]) -> float:
    """Seconds."""
    cache = llm.new_cache()
    start = perf_counter()
    for token in ids:
        llm.forward([token], cache)
    return perf_counter() - start
