"""`prosparse predict`: networks that name the active neurons before the gate is computed."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse import __version__, options
from prosparse.model.predictor import INPUTS
from prosparse.sparsify import measure

if TYPE_CHECKING:
    from prosparse.model.model import Model
    from prosparse.model.predictor import Predictors
    from prosparse.predictor.build import Wanted
    from prosparse.predictor.collect import Settings

_WAYS = ("lowrank", "published", "sketch", "sign")
_RANK = 128
_CLIP = 0.15  # of the published labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains predictors of a sparse model's active neurons, calibrates them to recalls on held-out text, "
        "reports what they are worth, and writes the model with them. The same command goes on where an "
        "interrupted one stopped."
    )
    add = parser.add_argument
    measure.add_arguments(parser)
    add(
        "--kind",
        default="lowrank",
        choices=(*_WAYS, "all"),
        help="model.gguf gets it; of all, lowrank [lowrank]",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, metavar="R", help=f"of networks, every layer [{_RANK}]")
    size.add_argument("--budget", type=float, metavar="B", help="bytes of networks as a share of the gate's")
    add("--recall", type=float, default=0.97, metavar="X", help="default recall, part of the file [0.97]")
    add(
        "--input",
        default="residual",
        choices=INPUTS,
        help="of networks; PowerInfer's are residual [residual]",
    )
    add(
        "--importance",
        type=float,
        default=1.0,
        metavar="X",
        help="lowrank: how much a neuron's mean output counts in what is missed; 0: all alike [1]",
    )
    add("--labels", default="all", choices=("all", "clip15"), help="of published networks [all]")
    add("--type", default="q8_0", choices=("q8_0", "q4_0", "f16"), help="of the networks [q8_0]")
    add("--held-out", type=float, default=0.05, metavar="X", help="calibrates, and as much reports [0.05]")
    add("--epochs", type=int, metavar="N", help="most passes over the tokens [8; published: 20]")
    add("--ppl-tokens", type=int, default=16384, metavar="N", help="of held-out text for perplexity [16384]")
    add("--max-gb", type=float, default=64.0, metavar="X", help="most disk for activations, GB [64]")
    add("--seed", type=int, default=0, metavar="N")
    add("--speed", action="store_true", help="also measure tokens per second of model.gguf")


def main(args: argparse.Namespace) -> int:
    result = predict(args)
    if args.json:
        options.print_json(result)
    return 0


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """The whole of it; `args.out` gets `report.json`, `report.png`, `model.gguf` and `model_{i}.pt`."""
    from prosparse.formats import open_model

    original = open_model(args.model)
    activation = original.config.activation
    if not activation.sparse:
        raise ValueError(
            f"{activation.name} has no exact zeros, so there is nothing to predict: make the model sparse "
            "first (prosparse sparsify)"
        )
    try:
        import torch
    except ImportError:
        raise ValueError("this needs torch: install the build for your machine from pytorch.org") from None
    from prosparse.formats.files import written_whole
    from prosparse.predictor import collect, report
    from prosparse.predictor.build import build

    ways = _WAYS if args.kind == "all" else (args.kind,)
    wanted = {way: _wanted(args, way) for way in ways}
    settings = _settings(args, list(wanted.values()))
    batches = measure.samples(args, original)
    trunk, _ = measure.load(original, args.device)
    device = trunk.head.device
    parts = collect.split(batches, settings.held_out)
    with _progress() as show:
        collection = collect.collect(
            trunk,
            parts,
            args.out / "collected",
            settings,
            model=collect.fingerprint(original),
            micro=args.micro,
            progress=lambda done, total: show(done, total, "collecting activations"),
        )
        built: dict[str, Predictors] = {}
        for way in ways:
            built[way] = build(
                original,
                collection,
                wanted[way],
                args.out / "networks",
                device,
                partial(_named, show, way),
            )
        evaluation = _evenly(parts["report"], args.ppl_tokens)
        exact_loss, loss = report.loss_of(trunk, original, evaluation, args.micro)
        found = {}
        total = sum(len(p.recalls) + (p.kind == "lowrank") for p in built.values())
        done = 0

        def count(what: str) -> None:
            nonlocal done
            show(done, total, f"perplexity: {what}")
            done += 1

        for way, predictors in built.items():
            of_way = report.points(
                way, predictors, original, collection, loss=loss, device=device, progress=count
            )
            found[way] = predictors, of_way
    del trunk
    if device.type == "cuda":
        torch.cuda.empty_cache()
    first = ways[0]
    described = {
        "prosparse": __version__,
        "data": args.data,
        "tokens": collection.sizes,
        "ppl_tokens": int(evaluation.tokens[:, 1:].size),
        "settings": {way: asdict(w) for way, w in wanted.items()},
    } | report.described(original, found, exact_loss)
    described["notes"] = _write(args, original, built[first])
    described["speeds"] = report.speeds(args.out / "model.gguf", built[first].recalls) if args.speed else None
    with written_whole(args.out / "report.json") as file:
        file.write(json.dumps(described, indent=1, allow_nan=False).encode() + b"\n")
    try:
        from prosparse.predictor.plot import plot

        plot(described, args.out / "report.png")
    except ImportError:
        described["notes"].append("no curves: install matplotlib for report.png")
    print(report.table(described))
    for name, rate in (described["speeds"] or {}).items():
        print(rate if name == "note" else f"{name}: {rate:.1f} tok/s")
    for note in described["notes"]:
        print(f"note: {note}")
    return described


def _wanted(args: argparse.Namespace, way: str) -> "Wanted":
    from prosparse.predictor.build import RECALLS, Wanted
    from prosparse.predictor.train import Training

    if not 0 < args.recall < 1:
        raise ValueError(f"--recall is a share below 1, not {args.recall}")
    rank = args.rank if args.rank is not None or args.budget is not None else _RANK
    if way == "published":
        training = Training(1, epochs=args.epochs or 20, seed=args.seed)
    else:
        # of 1e-3 to 1e-2 and constant or falling, the best in two epochs on SmolLM2-135M
        training = Training(1, epochs=args.epochs or 8, learning_rate=6e-3, decay=True, seed=args.seed)
    return Wanted(
        way=way,  # type: ignore[arg-type]
        input=args.input,
        recalls=RECALLS,
        default=args.recall,
        type=args.type.upper(),
        rank=rank,
        budget=args.budget,
        importance=args.importance,
        clipped=args.labels == "clip15",
        training=training,
    )


def _settings(args: argparse.Namespace, wanted: "list[Wanted]") -> "Settings":
    from prosparse.predictor.collect import Settings

    needed = {w.input if w.networks else "normed" for w in wanted}
    return Settings(
        tokens=args.tokens,
        context=args.context,
        inputs=tuple(name for name in INPUTS if name in needed),
        clip=_CLIP if any(w.way == "published" and w.clipped for w in wanted) else None,
        held_out=args.held_out,
        max_gb=args.max_gb,
    )


def _evenly(batch: Any, tokens: int) -> Any:
    """Sequences of about `tokens` tokens from all over a batch, at least one."""
    from prosparse.sparsify.batches import Batch

    n, context = len(batch.tokens), batch.tokens.shape[1] - 1
    wanted = min(n, max(1, tokens // context))
    at = [i * n // wanted for i in range(wanted)]
    return Batch(batch.tokens[at], batch.loss[at], batch.document[at])


def _write(args: argparse.Namespace, original: "Model", predictors: "Predictors") -> list[str]:
    """The model with its predictors, and the networks alone; what the user must know about them."""
    from prosparse.formats import convert, open_model
    from prosparse.formats.open import find

    notes = []
    target = args.out / "model.gguf"
    if target.exists() and target.samefile(find(args.model)):
        raise ValueError(f"{target} is the model itself: choose another --out")
    convert.write_model(target, replace(original, predictors=predictors), convert.provenance(args.model))
    if open_model(target).predictors is None:
        notes.append(f"{target} holds no predictors: this build cannot store them in GGUF yet")
    if predictors.kind == "lowrank":
        if predictors.input == "residual":
            write_networks(args.out, predictors)
            notes.append("model_*.pt are for PowerInfer's converter; its threshold is 0 for all layers")
        else:
            notes.append("no model_*.pt: PowerInfer's predictors see the residual stream (--input residual)")
    return notes


def write_networks(folder: Path, predictors: "Predictors") -> None:
    """`model_{i}.pt` for every layer, {"fc1.weight" [rank, d], "fc2.weight" [d_ff, rank]} in float16: what
    PowerInfer's `convert.py` takes as a predictor folder."""
    import torch

    from prosparse.formats.files import written_whole

    for layer, pair in enumerate(predictors.networks):
        halves = [torch.from_numpy(tensor.dequantize()).half() for tensor in pair]
        if not all(half.isfinite().all() for half in halves):
            raise ValueError(f"the network of layer {layer} is beyond float16")
        with written_whole(folder / f"model_{layer}.pt") as file:
            torch.save(dict(zip(("fc1.weight", "fc2.weight"), halves, strict=True)), file)


def _named(show: Callable[[int, int, str], None], way: str, done: int, total: int, what: str) -> None:
    show(done, total, f"{way}: {what}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """show(done, of all, what): a bar on a terminal, else a line now and then."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        said = -1e9

        def show(done: int, total: int, what: str) -> None:
            nonlocal said
            bar.update(task, description=what, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - said > 30:
                said = time.monotonic()
                console.print(f"{done}/{total}  {what}", highlight=False, soft_wrap=True)

        yield show
