"""PowerInfer beside our engine, in turns on one PowerInfer file: tokens a second, ratios, bytes.

    python -m benchmarks.powerinfer --main PATH/main [-m MODEL] [--types f16,q4_0] [-t 2] [-n 128]

`--main` is the program of a build of your own, without CUDA. MODEL is any model with predictors that `convert
--powerinfer` takes. Without it, the 1B shape with random weights is made: a ReLU model whose predictors find
every active neuron, which suits PowerInfer. Both systems decode as many tokens, greedily, from BOS.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, shapes
from benchmarks.measure import Turns, alternate, median_ratio
from benchmarks.powerinfer_main import PowerInfer, checked
from benchmarks.relu_model import relu_model
from benchmarks.rivals import N_CTX, Process, Prosparse
from prosparse.formats import open_model
from prosparse.formats.powerinfer import TYPES, PowerInferFile, prepare
from prosparse.model.model import Model, Tensor

COMMAND = "python -m benchmarks.powerinfer"
RIVAL = "PowerInfer"
MODES = ("dense", "exact", "predicted")
TARGET = 1.5  # times PowerInfer's speed


@dataclass(frozen=True, slots=True)
class Bytes:
    """Weights that PowerInfer reads of a file for one token, by what decides how much of them."""

    always: float
    gate_up: float  # of all neurons; candidates only are read
    down: float  # likewise, active ones only

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Bytes":
        embedding = tensors["token_embd.weight"]
        sizes = {"gate_up": 0, "down": 0, "always": embedding.nbytes // embedding.shape[0] - embedding.nbytes}
        for name, tensor in tensors.items():
            down, gate_up = ".ffn_down_t." in name, ".ffn_gate." in name or ".ffn_up." in name
            sizes["down" if down else "gate_up" if gate_up else "always"] += tensor.nbytes
        return cls(**sizes)

    def per_token(self, candidates: float, active: float) -> float:
        """Of these shares of the neurons."""
        return self.always + candidates * self.gate_up + active * self.down


class Engine(Prosparse):
    """Ours, which can also say what it would write."""

    def greedy(self, n: int) -> list[int]:
        """BOS and the n - 1 tokens that follow, none of them an end token, as `--ignore-eos` has it."""
        config, cache = self._llm.config, self._llm.new_cache()
        # PowerInfer's own default
        tokens = [1 if config.bos_token_id is None else config.bos_token_id]
        while len(tokens) < n:
            logits = self._llm.forward(tokens[-1:], cache)[0].copy()
            logits[list(config.eos_token_ids)] = -np.inf
            tokens.append(int(logits.argmax()))
        return tokens

    def facts(self) -> dict[str, Any]:
        stats = self._llm.stats()
        shares = {key: stats[key] / stats["neurons"] for key in ("active", "candidates")}
        return super().facts() | shares


def compare(file: PowerInferFile, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row: `path` is the file, written. PowerInfer starts first: where it refuses, nothing else need."""
    threshold = file.metadata["powerinfer.sparse_threshold"]
    with contextlib.ExitStack() as stack:

        def process(runner: type, **options: Any) -> Process:
            return stack.enter_context(Process(runner, path=path, n_threads=args.threads, **options))

        systems = {RIVAL: process(PowerInfer, main=args.main, threshold=threshold, timeout=args.timeout)}
        systems |= {mode: process(Engine, mode=mode) for mode in MODES}
        # predicted mode computes what PowerInfer does, so it writes what PowerInfer would, up to rounding
        tokens = systems["predicted"].call("greedy", args.n)
        bandwidth = systems["dense"].call("bandwidth", args.threads)
        turns = alternate(systems, lambda system: system.call("decode", tokens), args.rounds)
        facts = {name: system.call("facts") for name, system in systems.items()}
    exact, predicted = facts["exact"], facts["predicted"]
    read = {mode: facts[mode]["bytes_per_token"] for mode in MODES}
    read[RIVAL] = Bytes.of(file.tensors).per_token(predicted["candidates"], predicted["active"])
    seconds = {name: of_rounds(turn) for name, turn in turns.items()}
    return {
        "model": file.metadata["general.name"],
        "file_mb": path.stat().st_size / 1e6,
        "threads": args.threads,
        "tokens": args.n,
        "sparsity": 1 - exact["active"],
        "predicted_sparsity": 1 - predicted["candidates"],
        "recall": predicted["active"] / exact["active"] if exact["active"] else 1.0,
        "bandwidth_gb_s": bandwidth,
        "target": TARGET,
        "ratios": {f"{mode}/{RIVAL}": median_ratio(seconds[RIVAL], seconds[mode]) for mode in MODES},
        "byte_ratios": {f"{mode}/{RIVAL}": read[RIVAL] / read[mode] for mode in MODES},
        "systems": {
            name: {
                "tok_s": 1 / statistics.median(values),
                "mb_per_token": read[name] / 1e6,
                "bandwidth_share": read[name] / statistics.median(values) / 1e9 / bandwidth,
                "noise": turns[name].noise,
                "round_ms": [1e3 * value for value in values],
                **facts[name],
            }
            for name, values in seconds.items()
        },
    }


def of_rounds(turns: Turns[list[float]]) -> list[float]:
    """Mean seconds a token of each round: PowerInfer tells no more, so ours is the mean too."""
    return [statistics.fmean(result) for result in turns.results]


def lines(row: Mapping[str, Any]) -> str:
    """One row for the terminal."""
    what = f"{row['model']} {row['type']} -t {row['threads']}, {row['file_mb']:.0f} MB"
    shares = f"{row['sparsity']:.1%} inactive, {row['predicted_sparsity']:.1%} predicted"
    text = [f"{what}: {shares}, recall {row['recall']:.1%}, memory reads {row['bandwidth_gb_s']:.1f} GB/s"]
    text.append(f"{'':<12}{'tok/s':>8}{'MB/token':>10}{'of memory':>11}{'÷ ' + RIVAL:>14}{'in bytes':>10}")
    for name, system in row["systems"].items():
        line = f"{name:<12}{system['tok_s']:>8.1f}{system['mb_per_token']:>10.1f}"
        line += f"{system['bandwidth_share']:>11.0%}"
        if (ratio := row["ratios"].get(f"{name}/{RIVAL}")) is not None:
            bound = row["byte_ratios"][f"{name}/{RIVAL}"]
            line += f"{ratio:>14.2f}{bound:>10.2f}   target {row['target']:g}: "
            line += "met" if ratio >= row["target"] else "missed"
        if system["noise"] > 0.1:
            line += f"  NOISY: others used {system['noise']:.0%} of a core"
        text.append(line)
    return "\n".join(text)


def measure(model: Model, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Writes the file of type `kind`, says what `convert` would note, and compares."""
    file = prepare(model, kind.upper(), as_relu=args.as_relu)
    for note in file.notes:
        print(f"note: {note}", file=sys.stderr)
    shapes.CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shapes.CACHE) as folder:
        path = Path(folder) / f"{kind}.pwri.gguf"
        file.write(path)
        row = {"type": kind} | compare(file, path, args)
    if args.model is None and not made_as_wanted(row, args):
        raise RuntimeError(
            f"{row['sparsity']:.3f} of the neurons are inactive and {row['predicted_sparsity']:.3f} predicted"
            f" so, not {args.sparsity} and {args.predicted}"
        )
    return row


def made_as_wanted(row: Mapping[str, Any], args: argparse.Namespace) -> bool:
    wanted = {"sparsity": args.sparsity, "predicted_sparsity": args.predicted}
    return all(abs(row[name] - share) <= 0.02 for name, share in wanted.items())


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--main", type=Path, required=True, metavar="PATH", help="PowerInfer's `main`")
    parser.add_argument("-m", "--model", help="a model with predictors [the 1B shape, random weights]")
    parser.add_argument("--as-relu", action="store_true", help="run a FATReLU model as relu there")
    parser.add_argument(
        "--types", type=lambda text: text.split(","), default=["f16", "q4_0"], help="[f16,q4_0]"
    )
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-n", type=int, default=128, help="tokens decoded a round [128]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run of main [600]")
    parser.add_argument("--sparsity", type=float, default=0.88, help="of the made model [0.88]")
    parser.add_argument("--predicted", type=float, default=0.80, help="share it names inactive [0.80]")
    parser.add_argument("--layers", type=int, default=52, help="of the made model [52]")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if unknown := {*args.types} - {name.lower() for name in TYPES}:
        parser.error(f"unknown type: {', '.join(sorted(unknown))}")
    if not 2 <= args.n <= N_CTX:
        parser.error(f"-n must be from 2 to {N_CTX}")
    if args.threads < 1 or args.rounds < 1 or args.layers < 1 or args.timeout <= 0:
        parser.error("-t, --rounds, --layers and --timeout must be positive")
    if not 0 < args.predicted <= args.sparsity < 1:
        parser.error("--predicted must be at most --sparsity, both between 0 and 1")
    return args


def command(args: argparse.Namespace) -> str:
    """For the results: names instead of paths."""
    model = f"--sparsity {args.sparsity} --predicted {args.predicted} --layers {args.layers}"
    if args.model:
        model = f"-m {Path(args.model).name}" + " --as-relu" * args.as_relu
    run = f"--types {','.join(args.types)} -t {args.threads} -n {args.n} --rounds {args.rounds}"
    return f"{COMMAND} --main {args.main.name} {model} {run}"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    rows: list[dict[str, Any]] = []
    results = {"machine": machine.describe(), "command": command(args), "rows": rows}
    try:
        checked(args.main)
        if args.model is None:
            model = relu_model(shapes.minicpm_1b(args.layers), args.sparsity, args.predicted)
        else:
            model = open_model(args.model)
        for kind in args.types:
            rows.append(measure(model, kind, args))
            print(lines(rows[-1]), flush=True)
            if args.out:
                # after every type: a long run that is stopped keeps what it measured
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps({"target": TARGET, "ratios": {row["type"]: row["ratios"] for row in rows}}))


if __name__ == "__main__":
    main()
