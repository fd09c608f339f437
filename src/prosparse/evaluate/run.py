"""`prosparse eval`: accuracy on seven benchmarks and perplexity on WikiText-2 (docs/evaluation.md)."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from prosparse import options
from prosparse.evaluate import runners, scoring
from prosparse.evaluate.perplexity import perplexity
from prosparse.evaluate.results import Results
from prosparse.evaluate.scoring import Progress
from prosparse.evaluate.tasks import NAMES, TASKS, WIKITEXT2, wikitext2

Job = Callable[[runners.MeasuringRunner, Progress], dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Accuracy on PIQA, SIQA, HellaSwag, WinoGrande, COPA, BoolQ and LAMBADA, zero-shot with the prompts "
        "of lm-evaluation-harness, and perplexity on WikiText-2. Sparsity is measured along the way."
    )
    options.add_model(parser, ctx=False)
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the benchmarks: DIR/piqa/valid.jsonl ...",
    )
    add("--tasks", default=",".join(NAMES), metavar="A,B", help=f"which of {', '.join(NAMES)} [all]")
    add("--limit", type=int, metavar="N", help="only the first N items; of WikiText-2, chunks [all]")
    add(
        "-c",
        "--ctx-size",
        dest="chunk",
        type=int,
        default=512,
        metavar="N",
        help="tokens a chunk of WikiText-2 [512]",
    )
    add("--device", metavar="D", help="run on torch there, cuda or cpu [the CPU engine]")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file, written after each task; a run that was interrupted goes on from it",
    )


def main(args: argparse.Namespace) -> int:
    names = _names(args)
    # all of them before the model is loaded: a damaged file is found at once
    jobs = {name: _job(name, args) for name in names}
    model = runners.open_model(args)
    settings = _settings(args, model)
    results = Results(settings, args.out)
    missing = [name for name in names if name not in results.tasks]
    if missing:
        runner, what = runners.load(args, model)
        del model
        if args.chunk > runner.n_ctx and WIKITEXT2 in missing:
            raise ValueError(f"-c is {args.chunk}, but the context holds {runner.n_ctx} tokens")
        print(f"{args.model} | {what}", file=sys.stderr)
        for name in missing:
            start = perf_counter()
            values = jobs[name](runner, _progress(name))
            seconds = round(perf_counter() - start, 3)
            results.add(name, values | {"sparsity": runner.sparsity(), "seconds": seconds})
            print(f"{name}: {values['metric']} {values['value']:.4f}, {seconds:.0f} s", file=sys.stderr)
    print(results.table())
    if args.json:
        options.print_json(results.to_json())
    return 0


def _names(args: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in args.tasks.split(",")]
    for name in names:
        if name not in NAMES:
            raise ValueError(f"--tasks knows no {name!r}: choose from {', '.join(NAMES)}")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {args.limit}")
    if args.chunk < 4:
        raise ValueError(f"-c must be at least 4, not {args.chunk}")
    return list(dict.fromkeys(names))


def _job(name: str, args: argparse.Namespace) -> Job:
    """What measures one benchmark, with its data read."""
    folder = args.data_dir / name
    if name == WIKITEXT2:
        text = wikitext2.load(folder)

        def measure_text(runner: runners.MeasuringRunner, progress: Progress) -> dict[str, Any]:
            ids = runner.tokenizer.encode(text, add_bos=False)
            found = perplexity(runner, ids, args.chunk, args.limit, lambda i, n, _: progress(i, n))
            values = {"n": found.n_tokens, "ppl_stderr": found.stderr, "nll": found.nll}
            return {"metric": "ppl", "value": found.ppl, "ppl": found.ppl, **values, "ctx": found.ctx}

        return measure_text
    task = TASKS[name]
    items = task.load(folder)[: args.limit]

    def measure_items(runner: runners.MeasuringRunner, progress: Progress) -> dict[str, Any]:
        found = asdict(scoring.evaluate(items, runner, progress))
        values = {key: value for key, value in found.items() if value is not None}
        return {"metric": task.headline, "value": values[task.headline], **values}

    return measure_items


def _settings(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What results depend on. The place of the model is not among them, its weights are."""
    from prosparse.predictor.collect import fingerprint

    return {
        "model": model.name,
        "weights": fingerprint(model),
        "runner": "engine" if args.device is None else f"torch {args.device}",
        "mode": args.mode,
        "recall": args.recall,
        "limit": args.limit,
        "chunk": args.chunk,
    }


def _progress(name: str) -> Progress:
    """Shown on a terminal, at most once a second."""
    shown = perf_counter()

    def show(done: int, of: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and (done == of or perf_counter() - shown > 1):
            shown = perf_counter()
            print(f"{name} {done}/{of} ", end="\n" if done == of else "\r", file=sys.stderr, flush=True)

    return show
