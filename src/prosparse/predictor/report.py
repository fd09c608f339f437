"""What predictors are worth: recall, predicted sparsity, perplexity and bytes, on text not learnt from."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prosparse.engine.traffic import Traffic
from prosparse.model.model import Model
from prosparse.model.predictor import Predictors
from prosparse.predictor import metrics
from prosparse.predictor.collect import Collection, watching
from prosparse.predictor.metrics import Counts
from prosparse.predictor.networks import predictor_bytes, scorer, weights_of
from prosparse.sparsify import measure
from prosparse.sparsify.batches import Batch

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk

_MATRICES = "model.layers.{}.mlp.{}_proj.weight"


@dataclass(frozen=True, slots=True)
class Point:
    """Predictors at one setting. `asked`: the recall they are calibrated to, None for threshold 0, at which a
    network decides that was trained as published. `loss`: nats a token with other neurons left out."""

    way: str
    asked: float | None
    counts: tuple[Counts, ...]  # by layer
    loss: float | None
    ffn_bytes: float  # a token: predictor, gates of candidates, up and down of the active among them
    ffn_bytes_all: float  # the same with up and down of all candidates

    @property
    def recall(self) -> float:
        """Mean over layers of the activation recall."""
        return float(np.mean([c.recall for c in self.counts]))

    @property
    def predicted_sparsity(self) -> float:
        """Mean over layers."""
        return float(np.mean([c.predicted_sparsity for c in self.counts]))

    @property
    def sparsity(self) -> float:
        """Mean over layers of the share that is inactive."""
        return float(np.mean([c.sparsity for c in self.counts]))


def points(
    way: str,
    predictors: Predictors,
    model: Model,
    collection: Collection,
    *,
    loss: Callable[[Predictors, np.ndarray], float] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[Point]:
    """One for each calibrated recall, and for a network one at threshold 0, on the part "report" of the
    collection. `loss(predictors, thresholds)` gives the loss, if it is wanted."""
    layers = range(collection.layers)
    settings: list[tuple[float | None, np.ndarray]] = [(r, predictors.at(r)) for r in predictors.recalls]
    if predictors.kind == "lowrank":
        settings.append((None, np.zeros(len(layers), np.float32)))
    table = []
    for layer in layers:
        score = scorer(predictors.kind, weights_of(predictors, model, layer), device)
        inputs = collection.inputs(layer, predictors.input, "report")
        values = [float(thresholds[layer]) for _, thresholds in settings]
        table.append(metrics.count(score, inputs, collection.active(layer, "report"), values))
    found = []
    for i, (asked, thresholds) in enumerate(settings):
        counts = tuple(row[i] for row in table)
        if progress:
            progress(f"{way} at {'threshold 0' if asked is None else f'recall {asked:g}'}")
        found.append(
            Point(
                way,
                asked,
                counts,
                loss(predictors, thresholds) if loss else None,
                *predicted_bytes(model, predictors, counts),
            )
        )
    return found


def predicted_bytes(model: Model, predictors: Predictors, counts: Sequence[Counts]) -> tuple[float, float]:
    """FFN bytes a token: predictor + gates of candidates + up and down of the active among them; and with up
    and down of all candidates."""
    lean = full = 0.0
    for layer, (own, c) in enumerate(zip(predictor_bytes(predictors, model), counts, strict=True)):
        gate, up, down = _matrix_bytes(model, layer)
        named = c.candidates / c.elements
        lean += own + named * gate + c.hits / c.elements * (up + down)
        full += own + named * (gate + up + down)
    return lean, full


def exact_bytes(model: Model, counts: Sequence[Counts]) -> float:
    """FFN bytes a token of exact mode: all gates, up and down of the active."""
    total = 0.0
    for layer, c in enumerate(counts):
        gate, up, down = _matrix_bytes(model, layer)
        total += gate + c.active / c.elements * (up + down)
    return total


def dense_bytes(model: Model) -> tuple[int, int]:
    """(FFN bytes, other bytes) a token of dense mode."""
    sizes = {name: tensor.nbytes for name, tensor in model.tensors.items()}
    traffic = Traffic.of(sizes, model.config.vocab_size)
    return (
        traffic.gate + traffic.up + traffic.down,
        traffic.attention + traffic.head + traffic.norms,
    )


def _matrix_bytes(model: Model, layer: int) -> tuple[int, int, int]:
    gate, up, down = (model.tensors[_MATRICES.format(layer, part)].nbytes for part in ("gate", "up", "down"))
    return gate, up, down


@contextmanager
def masked(trunk: "Trunk", predictors: Predictors, model: Model, thresholds: np.ndarray) -> Iterator[None]:
    """x1 of neurons that are no candidates is 0, as in predicted mode. A NaN score names its neuron."""
    device = trunk.head.device
    scores = [
        scorer(predictors.kind, weights_of(predictors, model, layer), device)
        for layer in range(len(trunk.mlps))
    ]
    inputs: dict[int, Tensor] = {}

    def keep(name: str, layer: int, x: Tensor) -> None:
        if name == predictors.input:
            inputs[layer] = x

    def drop(layer: int) -> Callable[[Any, Any], Tensor]:
        def hook(_: Any, given: tuple[Tensor, ...]) -> Tensor:
            x = inputs.pop(layer)
            score = scores[layer](x.flatten(0, -2).float())
            out = (score < float(thresholds[layer])).view(given[0].shape)
            return given[0].masked_fill(out, 0)

        return hook

    with watching(trunk, keep, (predictors.input,)), ExitStack() as stack:
        for layer, mlp in enumerate(trunk.mlps):
            handle = mlp.down_proj.register_forward_pre_hook(drop(layer))
            stack.callback(handle.remove)
        yield


def loss_of(
    trunk: "Trunk", model: Model, batch: Batch, micro: int = 8
) -> tuple[float, Callable[[Predictors, np.ndarray], float]]:
    """The model's own loss on `batch`, nats a token, and the function that gives it with predictors."""

    def predicted(predictors: Predictors, thresholds: np.ndarray) -> float:
        with masked(trunk, predictors, model, thresholds):
            return measure.measure(trunk, batch, micro=micro).loss

    return measure.measure(trunk, batch, micro=micro).loss, predicted


def described(
    model: Model, found: Mapping[str, tuple[Predictors, Sequence[Point]]], exact_loss: float | None
) -> dict[str, Any]:
    """What report.json holds: all points with their layers, and the exact and dense bytes beside them."""
    first = next(iter(found.values()))[1][0]
    ffn, others = dense_bytes(model)
    gates = sum(_matrix_bytes(model, layer)[0] for layer in range(len(first.counts)))
    return {
        "model": model.name,
        "activation": [model.config.activation.name, model.config.activation.param],
        "sparsity": first.sparsity,
        "layer_sparsity": [c.sparsity for c in first.counts],
        "loss": exact_loss,
        "ppl": None if exact_loss is None else math.exp(exact_loss),
        "dense_ffn_bytes": ffn,
        "exact_ffn_bytes": exact_bytes(model, first.counts),
        "other_bytes": others,
        "ways": {
            way: {
                "kind": predictors.kind,
                "input": predictors.input,
                "default": predictors.default,
                "types": sorted({t.type for pair in predictors.networks for t in pair}),
                "ranks": [fc1.shape[0] for fc1, _ in predictors.networks],
                "bytes": sum(predictor_bytes(predictors, model)),
                "share_of_gate": sum(predictor_bytes(predictors, model)) / gates,
                "points": [_point(point, exact_loss) for point in of_way],
            }
            for way, (predictors, of_way) in found.items()
        },
    }


def _point(point: Point, exact_loss: float | None) -> dict[str, Any]:
    ratio = None
    if point.loss is not None and exact_loss is not None:
        ratio = math.exp(point.loss - exact_loss)
    return {
        "asked": point.asked,
        "recall": point.recall,
        "predicted_sparsity": point.predicted_sparsity,
        "ppl_ratio": ratio,
        "ffn_bytes": point.ffn_bytes,
        "ffn_bytes_all": point.ffn_bytes_all,
        "layer_recall": [c.recall for c in point.counts],
        "layer_predicted_sparsity": [c.predicted_sparsity for c in point.counts],
    }


def table(report: Mapping[str, Any]) -> str:
    """The columns of the model card (setting, average sparsity, predicted sparsity, activation recall), then
    perplexity and FFN megabytes a token, as Markdown."""
    lines = [
        "| setting | average sparsity | predicted sparsity | activation recall | perplexity | FFN MB/token "
        "| with all three of candidates |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    sparsity = f"{report['sparsity']:.2%}"
    dense, exact = report["dense_ffn_bytes"] / 1e6, report["exact_ffn_bytes"] / 1e6
    lines.append(f"| dense | - | - | - | | {dense:.1f} | |")
    ppl = "" if report["ppl"] is None else f"{report['ppl']:.3f}"
    lines.append(f"| exact | {sparsity} | - | - | {ppl} | {exact:.1f} | |")
    for way, found in report["ways"].items():
        for point in found["points"]:
            asked = "threshold 0" if point["asked"] is None else f"{point['asked']:g}"
            ratio = "" if point["ppl_ratio"] is None else f"{point['ppl_ratio'] - 1:+.2%}"
            lines.append(
                f"| {way} {asked} | {sparsity} | {point['predicted_sparsity']:.2%} | {point['recall']:.2%} "
                f"| {ratio} | {point['ffn_bytes'] / 1e6:.1f} | {point['ffn_bytes_all'] / 1e6:.1f} |"
            )
    return "\n".join(lines)


def speeds(
    path: str | Path, recalls: Sequence[float], *, tokens: int = 96, rounds: int = 3
) -> dict[str, Any]:
    """Tokens per second of decoding the model at `path`: "exact", "dense", and predicted at each recall,
    medians of `rounds` in turns over the same tokens, which exact mode chooses. `{"note": why}` where this
    build has no predicted mode or the file no predictors."""
    import prosparse
    from prosparse.engine.engine import Context

    settings: dict[str, dict[str, Any]] = {"exact": {"mode": "exact"}, "dense": {"mode": "dense"}}
    settings |= {f"{recall:g}": {"mode": "predicted", "recall": recall} for recall in recalls}
    rates: dict[str, list[float]] = {name: [] for name in settings}
    ids: list[int] = []
    for _ in range(rounds):
        for name, options in settings.items():
            try:
                llm = prosparse.load(path, **options)
            except (TypeError, ValueError) as error:
                if options["mode"] != "predicted":
                    raise
                return {"note": f"speeds were not measured: {error}"}
            prompt = llm.tokenizer.encode("The history of the world, in short:")
            context = Context(llm, len(prompt) + tokens)
            context.start(prompt)
            seconds = []
            for i in range(tokens):
                if len(ids) <= i:
                    ids.append(int(context.logits.argmax()))
                start = perf_counter()
                context.append(ids[i])
                seconds.append(perf_counter() - start)
            rates[name].append(1 / median(seconds))
    return {name: median(found) for name, found in rates.items()}
