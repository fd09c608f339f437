"""Predicted mode beside exact mode and the dense twin: the 1B shape at 88 % with a low-rank predictor.

    python -m benchmarks.predicted [--type q8_0] [--predictor q8_0] [--predicted 0.8] [--threads 2]

Random gates cannot be predicted, so gates here have rank 64 by construction and the predictor of rank 128 is
that factorisation (relu(Bx) and relu(-Bx)): stored as Q8_0 it finds every active neuron, and its threshold
names `--predicted` of the neurons inactive. Speed depends on these shares and shapes alone. llama.cpp, where
installed, runs the same shapes with Swish. Systems take turns, each in a process of its own.
"""

import argparse
import contextlib
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, shapes
from benchmarks.measure import alternate, median_ratio
from benchmarks.rivals import LlamaCpp, Process, Prosparse
from prosparse.formats import open_model, quants
from prosparse.formats.convert import write_model
from prosparse.model.activation import Activation
from prosparse.model.model import Tensor
from prosparse.model.predictor import Predictors

COMMAND = "python -m benchmarks.predicted"
RESULTS = Path(__file__).resolve().parent / "results"
RANK = 64


def stored(values: np.ndarray, type: str) -> Tensor:
    return Tensor(type, values.shape, quants.quantize(values, type))


def predictable(
    shape: shapes.Shape, type: str, sparsity: float, predicted: float, predictor: str = "q8_0"
) -> Path:
    """The shape's file with gates of rank 64 and the predictor, of type `predictor`, that finds them."""
    kind = "predictable" if predictor == "q8_0" else f"predictable-{predictor}"
    path = shapes.CACHE / f"{shape.name}-{shape.layers}l-{type}-{kind}-{sparsity}-{predicted}.gguf"
    if path.exists():
        return path
    model = open_model(shapes.cached(shape, type))
    rng = np.random.default_rng(0)
    tensors, networks = dict(model.tensors), []
    scale = np.float32(shapes.WEIGHT_STD / RANK**0.5)
    for layer in range(shape.layers):
        a = rng.standard_normal((shape.ffn, RANK), np.float32)
        b = rng.standard_normal((RANK, shape.hidden), np.float32) * scale
        tensors[f"model.layers.{layer}.mlp.gate_proj.weight"] = stored(a @ b, type.upper())
        pair = np.vstack([b, -b]), np.hstack([a, -a])
        networks.append((stored(pair[0], predictor.upper()), stored(pair[1], predictor.upper())))
    deviation = shapes.WEIGHT_STD * shape.hidden**0.5

    def threshold(share: float) -> float:
        return float(deviation * statistics.NormalDist().inv_cdf(share))

    activation = Activation("fatrelu", threshold(sparsity))
    thresholds = tuple((threshold(predicted),) for _ in range(shape.layers))
    predictors = Predictors("lowrank", "normed", (0.99,), thresholds, 0.99, tuple(networks))
    config = replace(model.config, activation=activation)
    write_model(path, replace(model, config=config, tensors=tensors, predictors=predictors))
    return path


def measure(args: argparse.Namespace) -> dict[str, Any]:
    shape = shapes.minicpm_1b(args.layers)
    path = predictable(shape, args.type, args.sparsity, args.predicted, args.predictor)
    tokens = np.random.default_rng(0).integers(3, 30000, args.n).tolist()
    with contextlib.ExitStack() as stack:

        def process(runner: type, file: Path, **options: Any) -> Process:
            return stack.enter_context(Process(runner, path=file, n_threads=args.threads, **options))

        systems = {mode: process(Prosparse, path, mode=mode) for mode in ("dense", "exact", "predicted")}
        with contextlib.suppress(ImportError):
            import llama_cpp  # noqa: F401

            systems["llama.cpp"] = process(LlamaCpp, shapes.cached(shape, args.type))
        turns = alternate(systems, lambda system: system.call("decode", tokens), args.rounds)
        facts = {name: system.call("facts") for name, system in systems.items()}
        bandwidth = systems["dense"].call("bandwidth", args.threads)
    rounds = {name: [float(np.median(r)) for r in turn.results] for name, turn in turns.items()}
    read = {name: fact["bytes_per_token"] for name, fact in facts.items() if "bytes_per_token" in fact}
    pairs = [(a, b) for a in ("exact", "predicted") for b in rounds if b != a]
    return {
        "command": f"{COMMAND} --type {args.type} --predictor {args.predictor} --predicted {args.predicted} "
        f"--threads {args.threads}",
        "machine": machine.describe(),
        "shape": f"{shape.name}, {shape.layers} layers",
        "type": args.type,
        "threads": args.threads,
        "bandwidth_gb_s": bandwidth,
        "tok_s": {name: 1 / statistics.median(values) for name, values in rounds.items()},
        "noise": {name: turn.noise for name, turn in turns.items()},
        "mb_per_token": {name: value / 1e6 for name, value in read.items()},
        "sparsity": facts["exact"]["sparsity"],
        "ratios": {f"{a}/{b}": median_ratio(rounds[b], rounds[a]) for a, b in pairs},
        "byte_bounds": {name: read["dense"] / value for name, value in read.items()},
        "facts": facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--type", default="q8_0", choices=shapes.TYPES)
    parser.add_argument("--predictor", default="q8_0", choices=("q8_0", "q4_0"), help="its type [q8_0]")
    parser.add_argument("--sparsity", type=float, default=0.88, help="inactive neurons [0.88]")
    parser.add_argument("--predicted", type=float, default=0.80, help="of them named inactive [0.80]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=52)
    parser.add_argument("-n", type=int, default=16, help="tokens decoded a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    result = measure(args)
    print(json.dumps({key: value for key, value in result.items() if key != "facts"}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
