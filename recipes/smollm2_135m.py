"""The built-in model: SmolLM2-135M-Instruct made sparse on one to four GPUs, leg by leg.

    python recipes/smollm2_135m.py self --seed 2 --data DATA --out DATA    # text that the original writes
    python recipes/smollm2_135m.py leg 90 --data DATA --out RUNS    # one leg, from the one before it
    python recipes/smollm2_135m.py eval 90 --out RUNS --eval-data EVAL
    python recipes/smollm2_135m.py table                            # the table of docs, from saved results

DATA holds the corpora (`openstax.jsonl.zst`, ..., or stores of their tokens under the same names) and what
`self --seed N` wrote. A leg leaves RUNS/NAME.gguf in Q8_0: that file is all that the next leg needs. What it
measured is kept under `docs/runs/smollm2_135m`. `--gpus` and `--micro` change its speed alone. Every command
that is run is printed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORIGINAL = "demo-original"
NAME = "SmolLM2-135M-Instruct, 88 % sparse"  # of what adapters make
RESULTS = Path(__file__).parents[1] / "docs" / "runs" / "smollm2_135m"
# Shares of the mix. What the original writes is the only text like that of the web. Small corpora have small
# shares: what is read forty times is learnt by heart, and the model of other text like it is none the better.
MIX = {
    "self_6": 2.6,
    "self_7": 2.6,
    "self_8": 2.6,
    "self_9": 2.6,
    "openstax": 2.3,
    "classic_books": 1.5,
    "docs_permissive": 0.8,
    "code_python": 0.7,
    "instruct": 0.2,
    "sgd_dialogues": 0.2,
    "wiki_intro": 0.25,
    "us_speeches": 0.1,
}
THIRD_MIX = {
    "self_2": 2.3,
    "self_3": 2.3,
    "self_4": 2.3,
    "self_5": 2.3,
    "openstax": 2.4,
    "classic_books": 1.6,
    "docs_permissive": 0.9,
    "code_python": 0.7,
    "instruct": 0.2,
    "sgd_dialogues": 0.2,
    "wiki_intro": 0.25,
    "us_speeches": 0.1,
}
SECOND_MIX = {
    "self_0": 4.0,
    "self_1": 4.0,
    "openstax": 2.4,
    "classic_books": 1.4,
    "docs_permissive": 1.3,
    "code_python": 1.0,
    "instruct": 0.35,
    "sgd_dialogues": 0.35,
    "wiki_intro": 0.2,
    "us_speeches": 0.1,
}
# of the ablations, which came first
FIRST_MIX = {
    "self_0": 2.0,
    "self_1": 2.0,
    "openstax": 2.0,
    "classic_books": 1.5,
    "wiki_intro": 1.5,
    "docs_permissive": 1.0,
    "code_python": 0.8,
    "instruct": 0.7,
    "sgd_dialogues": 0.4,
    "us_speeches": 0.4,
}

# What the original writes, in rows of 512. Many go on from how these texts begin, an encyclopedia above all,
# whose names it would seldom come to by itself.
SELF_CHAT, SELF_CONTEXT, SELF_ROWS = 0.25, 512, 3072
SELF_PROMPTS = {"wiki_intro": 2.0, "openstax": 1.0, "classic_books": 1.0}


@dataclass(frozen=True, slots=True)
class Own:
    """Text of one seed: tokens, temperature, and the share of rows that go on from text."""

    tokens: float
    temperature: float = 1.0
    prompted: float = 0.45


OWN = {
    0: Own(30e6, prompted=0.0),
    1: Own(30e6, prompted=0.0),
    2: Own(23.5e6),
    3: Own(23.5e6),
    4: Own(23.5e6, temperature=0.9),
    5: Own(23.5e6, temperature=0.8),
    6: Own(40e6, prompted=0.0),
    7: Own(40e6, prompted=0.6),
    8: Own(40e6, temperature=0.9, prompted=0.6),
    9: Own(40e6, temperature=0.8, prompted=0.6),
}


@dataclass(frozen=True, slots=True)
class Leg:
    """Options of `prosparse sparsify`; `after` is the leg whose model it starts with, as an adapter of `size`
    MB, whose codes train, where that is given."""

    tokens: float
    options: str
    after: str | None = None
    size: float | None = None
    batch_tokens: int = 1 << 15
    mix: Mapping[str, float] = field(default_factory=lambda: MIX)


def _ablation(options: str) -> Leg:
    return Leg(16e6, f"{options} --lr 5e-4 --keep-embeddings", batch_tokens=1 << 16, mix=FIRST_MIX)


_MUON = "--optimizer muon --concentration 0"
_NEAR = f"{_MUON} --noise 0.15 --attention-rate 0.3 --pull 0.08"
_GENTLY = f"{_MUON} --lr-floor 0.01 --noise 0.15 --attention-rate 0.15"


def _by_worth(rate: str) -> Leg:
    options = f"--target 0.884 --reach 0.1 --size 19.8 --lr {rate} --lr-floor 0.01 --type f32 {_NEAR}"
    return Leg(634.1e6, options, "fourth", size=19.3)


LEGS = {
    # the method, at equal tokens
    "relu": _ablation("--l1 0"),
    "l1": _ablation("--l1 2e-3,1e-2,5e-2,1e-1"),
    "target": _ablation("--target 0.9"),
    "states": _ablation("--target 0.9 --states 1"),
    # Models of earlier campaigns, each from another. `trunk` is step 1600 of 3357 that were planned, without
    # a report; `adapter` was the built-in model.
    "trunk": Leg(
        105e6,
        f"--target 0.826 --reach 1 --lr 2e-3 --lr-floor 0.67 --keep-embeddings {_MUON}",
        batch_tokens=1 << 16,
        mix=SECOND_MIX,
    ),
    "second": Leg(
        81e6,
        f"--target 0.902 --reach 0.4 --lr 1.5e-3 --lr-floor 0.01 --keep-embeddings {_MUON}",
        "trunk",
        mix=SECOND_MIX,
    ),
    "adapter": Leg(
        28e6,
        f"--target 0.888 --reach 0.1 --lr 1e-3 --lr-floor 0.01 --levels 3:2 --type f32 {_MUON}",
        "second",
        mix=SECOND_MIX,
    ),
    "third": Leg(
        342.6e6,
        f"--target 0.905 --reach 0.1 --lr 2e-3 --lr-floor 0.01 --keep-embeddings {_MUON}",
        "adapter",
        mix=THIRD_MIX,
    ),
    "third_95": Leg(
        90.5e6,
        f"--target 0.953 --reach 0.3 --lr 1.5e-3 --lr-floor 0.01 --keep-embeddings {_MUON}",
        "third",
        mix=THIRD_MIX,
    ),
    "adapter_2": Leg(
        90.5e6,
        f"--target 0.886 --reach 0.1 --lr 1e-3 --lr-floor 0.01 --levels 3:2 --type f32 {_MUON}",
        "third",
        mix=THIRD_MIX,
    ),
    # from the original; when these were trained, sequences with noise counted as sparsity too
    "fourth": Leg(793.6e6, f"--target 0.903 --reach 0.3 --lr 2e-3 --keep-embeddings {_GENTLY} --pull 0.06"),
    "fourth_95": Leg(
        38.7e6, f"--target 0.952 --reach 0.3 --lr 1.5e-3 --keep-embeddings {_GENTLY} --pull 0.1", "fourth"
    ),
    "adapter_3": Leg(
        38.7e6,
        f"--target 0.884 --reach 0.1 --lr 1e-3 --levels 3,gate_proj=2 --type f32 {_GENTLY} --pull 0.3",
        "fourth",
    ),
    "90": Leg(
        279.2e6,
        f"--target 0.9035 --reach 0.1 --lr 1e-3 --lr-floor 0.01 --keep-embeddings {_MUON} "
        "--attention-rate 0.3",
        "third",
    ),
    "fifth_95": Leg(
        242.8e6,
        f"--target 0.9515 --reach 0.3 --lr 1.2e-3 --lr-floor 0.01 --keep-embeddings {_MUON} "
        "--attention-rate 0.3",
        "90",
    ),
    "95": Leg(
        360.1e6,
        f"--target 0.953 --reach 0.3 --lr 1.2e-3 --lr-floor 0.01 --keep-embeddings {_MUON} "
        "--attention-rate 0.3",
        "90",
    ),
    # from the original, in codes from the first step; it was the built-in model
    "adapter_4": Leg(
        530.9e6,
        f"--target 0.886 --reach 0.3 --lr 1.2e-3 --lr-floor 0.01 --levels 3,gate_proj=2 --type f32 {_NEAR}",
    ),
    # from a full model, in codes from there: no better than the one before it
    "adapter_5": Leg(
        361.0e6,
        f"--target 0.8845 --reach 0.1 --lr 1.2e-3 --lr-floor 0.01 --levels 3,gate_proj=2 --type f32 {_NEAR}",
        "fourth",
    ),
    # codes as fine as what they are worth, which then train; the second is the built-in model
    "adapter_6": _by_worth("5e-4"),
    "adapter_7": _by_worth("1.2e-3"),
}
_OWN = "its own text"
_STEPS_KEPT = 2000  # lines of a run's metrics, evenly spread


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("self", "leg", "eval", "table"))
    parser.add_argument("name", nargs="?", help=f"of a leg: {', '.join(LEGS)}")
    parser.add_argument("-m", "--model", default=ORIGINAL, help=f"the original [{ORIGINAL}]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the text")
    parser.add_argument("--eval-data", type=Path, metavar="DIR", help="the benchmarks")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="of small files")
    parser.add_argument("--seed", type=int, default=2, help="of self: 2 writes self_2")
    parser.add_argument("--micro", type=int, default=32, help="sequences at a time")
    parser.add_argument("--gpus", type=int, default=1, help="that a leg is spread over [1]")
    parser.add_argument("--device", default="cuda", help="[cuda]")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tokens, to try a leg out")
    parser.add_argument("rest", nargs="*", help="after --: more options of the leg's sparsify")
    args = parser.parse_intermixed_args()
    if args.what == "table":
        print(table(args.results))
        return 0
    if args.out is None or (args.what != "self" and args.name not in (*LEGS, "original")):
        parser.error("give --out DIR, and the name of a leg")
    if args.what == "eval" and args.eval_data is None:
        parser.error("give --eval-data DIR, where the benchmarks are")
    if args.what != "eval" and args.data is None:
        parser.error("give --data DIR, where the text is")
    {"self": write_self, "leg": run_leg, "eval": evaluate}[args.what](args)
    return 0


def write_self(args: argparse.Namespace) -> None:
    """A store of text that the original writes, DIR/self_SEED."""
    import torch

    from prosparse.formats import open_model
    from prosparse.sparsify import hf_model, selfdata, tokens

    if args.seed not in OWN:
        raise SystemExit(f"--seed {args.seed}: text of the seeds {', '.join(map(str, OWN))} is used")
    own, original = OWN[args.seed], open_model(args.model)
    config = original.config
    encoder = tokens.Encoder(original.tokenizer, config.bos_token_id, config.eos_token_ids)
    cache = args.out / "cache"
    prompts = None
    if own.prompted:
        stores = [tokens.build(str(_source(args.data, name)), encoder, cache) for name in SELF_PROMPTS]
        prompts = selfdata.Prompts(stores, list(SELF_PROMPTS.values()), own.prompted)
    kind = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    trunk = hf_model.load(original, device=args.device, dtype=kind)
    if args.device.startswith("cuda"):
        trunk.compile()
    store = selfdata.build(
        trunk,
        encoder,
        int(own.tokens * args.scale),
        cache,
        context=SELF_CONTEXT,
        batch=max(1, int(SELF_ROWS * min(1.0, args.scale))),
        seed=args.seed,
        temperature=own.temperature,
        chat=SELF_CHAT,
        prompts=prompts,
        key=f"{original.name}, seed {args.seed}",
        progress=lambda done, of_all: print(f"{done / 1e6:.1f} of {of_all / 1e6:.1f} M tokens", flush=True),
    )
    store.folder.rename(args.out / f"self_{args.seed}")


def run_leg(args: argparse.Namespace) -> None:
    """Trains, keeps what was measured, and writes the model as the next leg wants it."""
    leg, run, results = LEGS[args.name], args.out / args.name, args.results / args.name
    command = [sys.executable, "-m"]
    if args.gpus > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus}", "-m"]
    command += ["prosparse", "sparsify", "-m", args.model, "--out", str(run), "--device", args.device]
    if leg.size:
        command += ["--codes", str(_rounded(args, leg))]
    elif leg.after:
        command += ["--from", str(args.out / f"{leg.after}.gguf")]
    for name, weight in leg.mix.items():
        command += ["--data", f"{_source(args.data, name)}:{weight:g}"]
    command += ["--tokens", f"{leg.tokens * args.scale:g}", "--batch-tokens", str(leg.batch_tokens)]
    command += ["--micro", str(args.micro), "--compile", "--checkpoint-every", "2000"]
    _run(*command, *leg.options.split(), *args.rest)
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "report.json", results / "report.json")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    every = -(-len(lines) // _STEPS_KEPT)
    (results / "metrics.jsonl").write_text("".join(lines[every - 1 :: every]))
    settings = (run / "training.json").read_text()
    for place, called in ((args.data, "DATA"), (args.out, "RUNS"), (args.model, ORIGINAL)):
        settings = settings.replace(str(place), called)
    (results / "training.json").write_text(settings)
    if leg.size:
        shutil.copy(run / "adapter.gguf", args.out / f"{args.name}.adapter.gguf")
    _run(
        sys.executable,
        "-m",
        "prosparse",
        "convert",
        str(run / "model"),
        str(args.out / f"{args.name}.gguf"),
        "--type",
        "q8_0",
    )


def _rounded(args: argparse.Namespace, leg: Leg) -> Path:
    """The model that a leg starts with as an adapter, if it is not there yet."""
    made = args.out / f"{args.name}.start.gguf"
    if not made.exists():
        tuned = str(args.out / f"{leg.after}.gguf")
        command = [sys.executable, "-m", "prosparse", "convert", tuned, str(made), "--base", args.model]
        command += ["--size", f"{leg.size:g}", "--device", args.device, "--name", NAME]
        for name in leg.mix:
            command += ["--data", str(_source(args.data, name))]
        _run(*command)
    return made


def evaluate(args: argparse.Namespace) -> None:
    """Seven benchmarks and WikiText-2 of a leg's model, or of the original."""
    model = args.model if args.name == "original" else str(args.out / args.name / "model")
    results = args.results / args.name
    results.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prosparse", "eval", "-m", model, "--data-dir", str(args.eval_data)]
    _run(*command, "--device", args.device, "--out", str(results / "eval.json"), *args.rest)


def table(results: Path) -> str:
    """Two tables in Markdown: losses on held-out text, and benchmarks."""
    reports = {
        name: {_short(row["source"]): row for row in json.loads(path.read_text())["rows"]}
        for name in LEGS
        if (path := results / name / "report.json").exists()
    }
    names = list(reports)
    rows = {source: row for report in reports.values() for source, row in report.items()}
    corpora = [source for source in rows if not source.startswith(_OWN)]
    lines = [
        "| held-out text | original | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
        "| tokens seen, M | - | " + " | ".join(f"{seen(name) / 1e6:.0f}" for name in names) + " |",
    ]
    for source in sorted(rows, key=corpora.__contains__):
        gaps = [_gap([of[source]]) if source in of else "-" for of in reports.values()]
        lines.append(f"| {source} | {rows[source]['original']:.3f} | " + " | ".join(gaps) + " |")
    whole = sum(rows[source]["tokens"] * rows[source]["original"] for source in corpora)
    whole /= sum(rows[source]["tokens"] for source in corpora)
    gaps = [_gap([of[source] for source in corpora]) for of in reports.values()]
    lines.append(f"| all but its own | {whole:.3f} | " + " | ".join(gaps) + " |")
    return "\n".join([*lines, "", *_benchmarks(results)])


def _benchmarks(results: Path) -> Iterator[str]:
    found = {
        name: json.loads((results / name / "eval.json").read_text())["tasks"]
        for name in ("original", *LEGS)
        if (results / name / "eval.json").exists()
    }
    tasks = list(found["original"])
    yield "| model | " + " | ".join(tasks) + " | mean of tasks |"
    yield "|---" * (len(tasks) + 2) + "|"
    for name, of in found.items():
        cells = [_cell(of[task]) if task in of else "-" for task in tasks]
        scored = [of[task]["value"] for task in tasks if task in of and of[task]["metric"] != "ppl"]
        yield f"| {name} | " + " | ".join(cells) + f" | {100 * sum(scored) / len(scored):.2f} |"


def _cell(of: Mapping[str, Any]) -> str:
    """A result, and the sparsity it was measured at."""
    value = f"{of['value']:.2f}" if of["metric"] == "ppl" else f"{100 * of['value']:.2f}"
    return f"{value} ({of['sparsity']:.1%})" if of["sparsity"] else value


def _gap(rows: Collection[Mapping[str, Any]]) -> str:
    """Sparse minus original in nats a token, and sparsity."""
    tokens = sum(row["tokens"] for row in rows)
    gap = sum(row["tokens"] * (row["sparse"] - row["original"]) for row in rows) / tokens
    sparsity = sum(row["tokens"] * row["sparsity"] for row in rows) / tokens
    return f"{gap:+.3f} ({sparsity:.1%})"


def seen(name: str) -> float:
    """Tokens that a leg's model has seen, those of the legs before it included."""
    leg = LEGS[name]
    return leg.tokens + (seen(leg.after) if leg.after else 0.0)


def _short(source: str) -> str:
    name = Path(source).name.split(".")[0]
    return f"{_OWN}, {name.split(', ')[1]}" if source.endswith(_OWN) else name


def _source(data: Path, name: str) -> Path:
    """A store, or the packed text."""
    found = [data / name, data / f"{name}.jsonl.zst", data / f"{name}.jsonl.gz"]
    for path in found:
        if path.exists():
            return path
    raise SystemExit(f"{found[0]} is missing: give --data with the corpora and what `self` wrote")


def _run(*command: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
