"""`prosparse stats`: how sparse a model is, by corpus and layer, and how often each neuron is active.

The counts are for whoever must know hot neurons from cold ones: predictors, and placement on GPU and CPU.
"""

import argparse
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from prosparse import __version__, options
from prosparse.model.activation import Activation
from prosparse.sparsify import measure
from prosparse.sparsify.batches import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from prosparse.sparsify.hf_model import Trunk

HOT_SHARE = 0.8  # of activations; the neurons that make them are the hot ones
_COUNTS, _REPORT, _PLOT = "stats.npz", "stats.json", "stats.png"
# what reading broken files raises
_DAMAGED = (KeyError, TypeError, AttributeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Stats:
    """How often x1 of each neuron was not zero, by source. ValueError for parts that do not fit together."""

    model: str
    activation: Activation
    sources: tuple[str, ...]
    tokens: np.ndarray  # int64 [sources]: tokens that were fed
    losses: np.ndarray  # float64 [sources]: nats of the next token
    counts: np.ndarray  # int64 [sources, layers, d_ff]: tokens for which the neuron was active

    def __post_init__(self) -> None:
        n = len(self.sources)
        if not n or self.counts.ndim != 3 or {self.tokens.shape, self.losses.shape} != {(n,)}:
            raise ValueError("counts, tokens and losses do not fit the sources")
        if len(self.counts) != n or (self.counts < 0).any() or (self.counts.max((1, 2)) > self.tokens).any():
            raise ValueError("counts must be one a source and neuron, between 0 and the number of tokens")
        if not np.isfinite(self.losses).all() or (self.tokens < 1).any():
            raise ValueError("every source needs tokens and a finite loss")

    @property
    def pooled(self) -> np.ndarray:
        """int64 [layers, d_ff]: counts over all sources."""
        return self.counts.sum(0)

    @property
    def frequencies(self) -> np.ndarray:
        """float64 [layers, d_ff]: share of all tokens for which the neuron was active."""
        return self.pooled / self.tokens.sum()

    @property
    def sparsity(self) -> np.ndarray:
        """float64 [sources, layers]: share of zeros in x1."""
        elements = self.tokens[:, None] * self.counts.shape[2]
        return (elements - self.counts.sum(2)) / elements

    def save(self, folder: Path) -> None:
        """Writes `stats.npz` (counts, pooled, tokens) and `stats.json`, the report, which comes last."""
        from prosparse.formats.files import written_whole

        with written_whole(folder / _COUNTS) as file:
            np.savez_compressed(file, counts=self.counts, pooled=self.pooled, tokens=self.tokens)
        with written_whole(folder / _REPORT) as file:
            file.write(json.dumps(self.report(), indent=1, allow_nan=False).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The function `load`."""
        report_path, counts_path = folder / _REPORT, folder / _COUNTS
        try:
            report = json.loads(report_path.read_bytes())
            sources = report["sources"]
            with np.load(counts_path, allow_pickle=False) as arrays:
                counts, tokens = arrays["counts"], arrays["tokens"]
            # two files: a run that was killed between them, or one of another run
            if tokens.tolist() != [source["tokens"] for source in sources.values()]:
                raise ValueError(f"{_REPORT} and {_COUNTS} are of different runs")
            return cls(
                report["model"],
                Activation(**report["activation"]),
                tuple(sources),
                tokens,
                np.array([source["loss"] for source in sources.values()], np.float64),
                counts,
            )
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename} is missing: `prosparse stats --out {folder}` makes it"
            ) from None
        except _DAMAGED as error:
            raise ValueError(f"{folder} holds no statistics that can be read: {error}") from None

    def report(self) -> dict[str, Any]:
        """What `stats.json` holds."""
        rows = zip(self.sources, self.tokens, self.losses, self.counts, strict=True)
        return {
            "prosparse": __version__,
            "model": self.model,
            "activation": asdict(self.activation),
            "layers": self.counts.shape[1],
            "d_ff": self.counts.shape[2],
            "sources": {
                name: {"tokens": int(tokens), "loss": float(loss), **_described(counts, int(tokens))}
                for name, tokens, loss, counts in rows
            },
            "pooled": {
                "tokens": int(self.tokens.sum()),
                **_described(self.pooled, int(self.tokens.sum())),
            },
        }


def load(folder: str | Path) -> Stats:
    """What `prosparse stats --out FOLDER` has written. ValueError where it is missing or damaged."""
    return Stats.load(Path(folder))


def hot_share(counts: np.ndarray, share: float = HOT_SHARE) -> np.ndarray:
    """float64 [layers]: the smallest share of neurons that makes this share of a layer's activations.

    `counts` [layers, d_ff]; 0 for a layer without a single activation.
    """
    made = np.cumsum(np.sort(counts, axis=1)[:, ::-1], axis=1)
    needed = (made < share * made[:, -1:]).sum(1) + 1
    return np.where(made[:, -1] > 0, needed, 0) / counts.shape[1]


def _described(counts: np.ndarray, tokens: int) -> dict[str, Any]:
    """Sparsity, hot and dead neurons of counts [layers, d_ff]."""
    sparsity = 1 - counts.sum(1) / (tokens * counts.shape[1])
    dead = (counts == 0).sum(1)
    return {
        "sparsity": float(sparsity.mean()),
        "layer_sparsity": sparsity.tolist(),
        "hot_neurons": hot_share(counts).tolist(),
        "dead_neurons": int(dead.sum()),
        "layer_dead_neurons": dead.tolist(),
    }


def collect(
    trunk: "Trunk",
    batches: Mapping[str, Batch],
    *,
    model: str,
    activation: Activation,
    micro: int = 8,
    bfloat16: bool = False,
) -> Stats:
    """Runs the batch of each source. All tokens that are fed count, whether they are learnt or not."""
    import torch

    d_ff = trunk.mlps[0].gate_proj.weight.shape[0]
    counts, losses = [], []
    for batch in batches.values():
        active = torch.zeros(len(trunk.mlps), d_ff, dtype=torch.int64, device=trunk.head.device)

        def count(layer: int, x1: "Tensor", active: "Tensor" = active) -> None:
            active[layer] += (x1 != 0).flatten(0, -2).sum(0)

        measured = measure.measure(trunk, batch, micro=micro, bfloat16=bfloat16, observe=count)
        losses.append(measured.loss)
        counts.append(active.cpu().numpy())
    tokens = np.array([batch.tokens[:, 1:].size for batch in batches.values()], np.int64)
    return Stats(model, activation, tuple(batches), tokens, np.array(losses), np.stack(counts))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Sparsity of each layer on each corpus, and how often each neuron is active."
    measure.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    from prosparse.formats import open_model

    original = open_model(args.model)
    activation = original.config.activation
    batches = dict(zip(args.data, measure.samples(args, original), strict=True))
    trunk, bfloat16 = measure.load(original, args.device)
    stats = collect(
        trunk, batches, model=str(args.model), activation=activation, micro=args.micro, bfloat16=bfloat16
    )
    stats.save(args.out)
    try:
        plot(stats, args.out / _PLOT)
    except ImportError:
        print(f"no curves: install matplotlib for {_PLOT}")
    report = stats.report()
    print(f"{'tokens':>9}{'perplexity':>12}{'sparsity':>10}{'hot neurons':>13}{'dead':>7}  source")
    for name, row in [*report["sources"].items(), ("all", report["pooled"])]:
        ppl = f"{math.exp(row['loss']):.3f}" if "loss" in row else ""
        print(
            f"{row['tokens']:>9}{ppl:>12}{row['sparsity']:>10.2%}{np.mean(row['hot_neurons']):>13.1%}"
            f"{row['dead_neurons']:>7}  {name}"
        )
    if not activation.sparse:
        print(f"{activation.name} has no exact zeros: every neuron counts as active (prosparse sparsify)")
    print(
        f"hot neurons make {HOT_SHARE:.0%} of a layer's activations; all counts are in {args.out / _COUNTS}"
    )
    if args.json:
        options.print_json(report)
    return 0


def plot(stats: Stats, target: Path) -> None:
    """Sparsity by layer, a line a source; and how few neurons make most activations, for some layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from prosparse.formats.files import written_whole

    figure, (by_layer, by_neuron) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for name, sparsity in zip(_short(stats.sources), stats.sparsity, strict=True):
        by_layer.plot(100 * sparsity, ".-", label=name, linewidth=0.9)
    by_layer.set(xlabel="layer", ylabel="sparsity, %")
    by_layer.legend(fontsize=8)
    pooled = stats.pooled
    layers, d_ff = pooled.shape
    neurons = 100 * np.arange(d_ff + 1) / d_ff
    for layer in dict.fromkeys(np.linspace(0, layers - 1, 5).round().astype(int).tolist()):
        made = np.concatenate([[0], np.cumsum(np.sort(pooled[layer])[::-1])])
        by_neuron.plot(neurons, 100 * made / max(made[-1], 1), label=f"layer {layer}", linewidth=0.9)
    by_neuron.axhline(100 * HOT_SHARE, color="tab:gray", linestyle=":", linewidth=0.8)
    by_neuron.set(xlabel="neurons, most active first, %", ylabel="share of activations, %")
    by_neuron.legend(fontsize=8)
    figure.tight_layout()
    with written_whole(target) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _short(sources: Sequence[str]) -> list[str]:
    """File names without endings where these differ."""
    short = [
        source if source.startswith("hf:") else Path(source).name.partition(".")[0] for source in sources
    ]
    return short if len(set(short)) == len(short) else list(sources)
