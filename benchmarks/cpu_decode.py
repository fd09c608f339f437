"""CPU decoding and prefill: llama.cpp, our dense twin, our exact mode and PyTorch, in turns on one file.

    python -m benchmarks.cpu_decode [--quick] [--shapes 1b] [--types q8_0] [--threads 2] [--sparsity 0.88]

Writes benchmarks/results/cpu_decode_<machine>_<yyyymm>.json, a plot and a Markdown table beside it. Needs the
bench extra and 15 GB of memory for the largest cases; CONTRIBUTING.md says how the numbers are taken.
llama.cpp runs these files with Swish, the only activation it has for them: same work, other text. Beside the
built-in sparse model, `demo`, it runs the original at the same type.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report, shapes
from benchmarks.measure import Turns, alternate, median_ratio, p10
from benchmarks.rivals import LlamaCpp, Process, Prosparse, TorchBf16
from prosparse.engine.bench import sample_tokens
from prosparse.engine.traffic import Traffic
from prosparse.formats.convert import convert
from prosparse.formats.open import find, open_model
from prosparse.model.tokenizer import Tokenizer

COMMAND = "python -m benchmarks.cpu_decode"
RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = ("smollm2", "demo", "1b", "7b")
PREFILL = 128  # tokens
TORCH_SHAPES = ("smollm2", "1b")  # bfloat16 copies of larger ones do not fit beside the other systems
SMOLLM2_TYPES = ("q8_0", "q4_0", "f16")


@dataclass(frozen=True, slots=True)
class Case:
    """One model file with one activation."""

    shape: str
    type: str
    path: Path
    sparsity: float | None  # wanted share of inactive neurons; None: the file's own activation
    activation: dict[str, Any]  # overrides for `prosparse.load`
    torch: bool
    original: Path | None = None  # what llama.cpp runs instead: the model before it was made sparse

    def tokens(self, n: int) -> list[int]:
        """Ids to feed. Real text for real models: on random ids they would not be sparse in the same way."""
        if self.sparsity is not None:
            return np.random.default_rng(0).integers(3, 30000, n).tolist()
        model = open_model(self.path)
        tokenizer = Tokenizer.build(model.tokenizer, model.config.bos_token_id, model.config.eos_token_ids)
        return sample_tokens(tokenizer, n)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The wanted cases, their files made on the way."""
    for name in args.shapes:
        match name:
            case "smollm2":
                yield Case(name, "q4_1", find("demo-original"), None, {}, torch=True)
                for type in (type for type in args.types if type in SMOLLM2_TYPES):
                    yield Case(name, type, converted_demo(type), None, {}, torch=False)
            case "demo":
                original = converted_demo("q8_0")
                yield Case(name, "q8_0", find("demo"), None, {}, torch=False, original=original)
            case _:
                shape = shapes.minicpm_1b() if name == "1b" else shapes.llama_7b(args.layers_7b)
                for type in args.types:
                    for share in args.sparsity:
                        param = shapes.threshold(shape, type, share)
                        activation = {"hidden_act": "fatrelu", "hidden_act_param": param}
                        torch = name in TORCH_SHAPES and type == "bf16" and share == args.sparsity[0]
                        yield Case(name, type, shapes.cached(shape, type), share, activation, torch)


def converted_demo(type: str) -> Path:
    """SmolLM2 requantised: right for speed, not for quality."""
    path = shapes.CACHE / f"smollm2-{type}.gguf"
    if not path.exists():
        shapes.CACHE.mkdir(exist_ok=True)
        convert("demo-original", path, type.upper())
    return path


def start(case: Case, args: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Process]:
    """The case's systems by name, each loaded in a process that `stack` ends."""

    def process(runner: type, path: Path = case.path, **arguments: Any) -> Process:
        return stack.enter_context(Process(runner, path=path, n_threads=args.threads[0], **arguments))

    systems = {
        "llama.cpp": process(LlamaCpp, case.original or case.path),
        "dense": process(Prosparse, mode="dense", **case.activation),
    }
    if case.shape != "smollm2":
        systems["exact"] = process(Prosparse, mode="exact", **case.activation)
    if case.torch and args.torch:
        systems["PyTorch bf16"] = process(TorchBf16)
    return systems


def run_case(case: Case, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each number of threads."""
    model = open_model(case.path)
    traffic = Traffic.of({name: t.nbytes for name, t in model.tensors.items()}, model.config.vocab_size)
    decode_tokens, prefill_tokens = case.tokens(args.n), case.tokens(PREFILL)
    with contextlib.ExitStack() as stack:
        systems = start(case, args, stack)
        for threads in args.threads:
            for system in systems.values():
                system.call("set_threads", threads)
            bandwidth = systems["dense"].call("bandwidth", threads)
            decode = alternate(systems, lambda system: system.call("decode", decode_tokens), args.rounds)
            facts = {name: system.call("facts") for name, system in systems.items()}
            prefill: dict[str, Turns] = {}
            if args.prefill:
                prefill = alternate(
                    systems, lambda system: system.call("prefill", prefill_tokens), math.ceil(args.rounds / 2)
                )
            bandwidth = max(bandwidth, systems["dense"].call("bandwidth", threads))
            sparsity = facts["exact"]["sparsity"] if "exact" in facts else 0.0
            if case.sparsity is not None and abs(sparsity - case.sparsity) > 0.02:
                raise RuntimeError(f"{sparsity:.3f} of the neurons are inactive, not {case.sparsity}")
            read = dict.fromkeys(systems, sum(traffic.per_token().values()))
            read["exact"] = sum(traffic.per_token(1 - sparsity).values())
            yield {
                "shape": case.shape,
                "type": case.type,
                "threads": threads,
                "sparsity": sparsity,
                "bandwidth_gb_s": bandwidth,
                "byte_bound": read["dense"] / read["exact"],
                "ratios": _ratios(decode),
                "prefill_ratios": _ratios(prefill),
                "systems": {
                    name: _speed(decode[name], prefill.get(name), read[name], bandwidth) | facts[name]
                    for name in systems
                },
            }


def _speed(decode: Turns, prefill: Turns | None, bytes_read: float, bandwidth: float) -> dict[str, Any]:
    """`bytes_read`: of weights, a token, as the file stores them; the cache is too short to count."""
    seconds = [s for result in decode.results for s in result]
    median = statistics.median(seconds)
    return {
        "tok_s": 1 / median,
        "tok_s_p10": 1 / p10(seconds),
        "prefill_tok_s": PREFILL / statistics.median(prefill.results) if prefill else None,
        "gb_s": bytes_read / median / 1e9,
        "bandwidth_share": bytes_read / median / 1e9 / bandwidth,
        "noise": max(decode.noise, prefill.noise if prefill else 0.0),
        "round_ms": [1e3 * statistics.median(result) for result in decode.results],
    }


def _ratios(turns: dict[str, Turns]) -> dict[str, float]:
    """Speed of one system over another's."""

    def of_rounds(name: str) -> list[float]:
        return [float(np.median(result)) for result in turns[name].results]

    pairs = [("dense", "llama.cpp"), ("exact", "llama.cpp"), ("exact", "dense")]
    return {f"{a}/{b}": median_ratio(of_rounds(b), of_rounds(a)) for a, b in pairs if a in turns}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def counts(text: str) -> list[int]:
        return [int(part) for part in names(text)]

    def shares(text: str) -> list[float]:
        return [float(part) for part in names(text)]

    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", type=names, default=list(SHAPES), help=",".join(SHAPES))
    parser.add_argument("--types", type=names, default=list(shapes.TYPES), help=",".join(shapes.TYPES))
    parser.add_argument("--threads", type=counts, default=[1, 2])
    parser.add_argument("--sparsity", type=shares, default=[0, 0.67, 0.88, 0.95], help="for 1b and 7b")
    parser.add_argument("-n", type=int, default=16, help="tokens decoded a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers-7b", type=int, default=8, help="of the real 32")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--prefill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts too; llama.cpp built on a CPU with AMX may crash there",
    )
    parser.add_argument("--quick", action="store_true", help="3 short rounds at 2 threads, Q8_0, 88 %%")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    if args.quick:
        args.threads, args.sparsity, args.types, args.rounds, args.n = [2], [0.88], ["q8_0"], 3, 16
    if unknown := {*args.shapes} - {*SHAPES} | {*args.types} - {*shapes.TYPES}:
        parser.error(f"unknown shape or type: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    command = " ".join([COMMAND, *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    results = {"machine": machine.describe(), "command": command, "rows": rows}
    stem = args.out / f"cpu_decode_{machine.file_label()}"
    for case in cases(args):
        for row in run_case(case, args):
            rows.append(row)
            print(report.line(row), flush=True)
            # after every row: a long run that is stopped keeps what it measured
            report.save(results, stem)
    print(json.dumps({"rows": len(rows), "results": f"{stem.name}.json"}))


if __name__ == "__main__":
    main()
