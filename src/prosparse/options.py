"""Command-line options that several verbs share; flags and defaults follow llama.cpp."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prosparse.engine.engine import LLM
    from prosparse.engine.sampler import SamplingParams


def add_model(parser: argparse.ArgumentParser, *, default: str | None = None, ctx: bool = True) -> None:
    """`-m -t --mode --recall --hidden-act --hidden-act-param --json`, and `-c`."""
    parser.add_argument(
        "-m",
        "--model",
        metavar="M",
        required=default is None,
        default=default,
        help="GGUF file, Hugging Face folder, Hub id (org/name), demo, or demo-original"
        + (f" [{default}]" if default else ""),
    )
    if ctx:
        parser.add_argument(
            "-c",
            "--ctx-size",
            type=int,
            metavar="N",
            help="context in tokens [4096, or the model's own limit]",
        )
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="threads [one per usable core]")
    parser.add_argument(
        "--mode",
        default="auto",
        help="exact (skips inactive neurons, same result), dense, predicted (computes the neurons that the "
        "model's predictors name), or auto: exact if there are any [auto]",
    )
    parser.add_argument(
        "--recall",
        type=float,
        metavar="R",
        help="share of active neurons to find; with --mode auto, predicted where it is faster than exact",
    )
    parser.add_argument("--hidden-act", metavar="ACT", help="replace the model's activation, for experiments")
    parser.add_argument("--hidden-act-param", type=float, metavar="T", help="its threshold or shift")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The fields of SamplingParams, `-n` and `--stop`."""
    parser.add_argument(
        "-n",
        "--n-predict",
        type=int,
        default=128,
        metavar="N",
        help="most tokens to generate; -1: no limit [128]",
    )
    parser.add_argument("--temp", type=float, default=0.8, metavar="X", help="temperature; 0 is greedy [0.8]")
    parser.add_argument("--top-k", type=int, default=40, metavar="N", help="0 is off [40]")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="X", help="1 is off [0.95]")
    parser.add_argument("--min-p", type=float, default=0.05, metavar="X", help="0 is off [0.05]")
    parser.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="1 is off [1.0]")
    parser.add_argument(
        "--repeat-last-n", type=int, default=64, metavar="N", help="tokens it looks back; -1: all [64]"
    )
    parser.add_argument("-s", "--seed", type=int, metavar="N", help="random seed [differs every time]")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="S", help="text that ends the answer; may be repeated"
    )


def load(args: argparse.Namespace, **changes: Any) -> "LLM":
    """The model of `add_model`'s options; `changes` are further options of `prosparse.load`."""
    import prosparse

    options = {
        "n_ctx": getattr(args, "ctx_size", None),
        "n_threads": args.threads,
        "mode": args.mode,
        "recall": args.recall,
        "hidden_act": args.hidden_act,
        "hidden_act_param": args.hidden_act_param,
    }
    return prosparse.load(args.model, **options | changes)


def sampling(args: argparse.Namespace) -> "SamplingParams":
    """From `add_sampling`'s options."""
    from prosparse.engine.sampler import SamplingParams

    return SamplingParams(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        seed=args.seed,
    )


def print_json(result: dict[str, Any]) -> None:
    """One object on one line; with `--json` it is the last of stdout."""
    print(json.dumps(result, ensure_ascii=False), flush=True)
