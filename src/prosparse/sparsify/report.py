"""What a run gave: original, control and sparse model on text that none of them was trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prosparse.formats.files import written_whole
from prosparse.sparsify.batches import Batch, Mixture

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk
    from prosparse.sparsify.measure import Measured


@dataclass(frozen=True, slots=True)
class Row:
    """One source: held-out tokens, next-token losses in nats (`control` None where there is none), and the
    sparse model's sparsity [layers]."""

    source: str
    tokens: int
    original: float
    control: float | None
    sparse: float
    layers: Sequence[float]


@dataclass(frozen=True, slots=True)
class Report:
    """`control_is`: what the control is, in words. `rows` is empty where no source could spare any text."""

    control_is: str
    rows: Sequence[Row]
    thresholds: Sequence[float]

    @property
    def layers(self) -> np.ndarray:
        """float64 [layers]: sparsity over the held-out text of all sources, token by token."""
        return np.average(
            [row.layers for row in self.rows], axis=0, weights=[row.tokens for row in self.rows]
        )

    def summary(self) -> dict[str, Any]:
        """Over the held-out text of all sources, token by token; nothing where there is none."""
        if not self.rows:
            return {}
        tokens = [row.tokens for row in self.rows]

        def mean(values: Sequence[float]) -> float:
            return round(float(np.average(values, weights=tokens)), 4)

        return {
            "held_out_tokens": sum(tokens),
            "loss": mean([row.sparse for row in self.rows]),
            "original_loss": mean([row.original for row in self.rows]),
            "sparsity": round(float(self.layers.mean()), 4),
        }

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "source": row.source,
                "tokens": row.tokens,
                "original": row.original,
                "control": row.control,
                "sparse": row.sparse,
                "sparsity": float(np.mean(row.layers)),
                "layers": list(row.layers),
            }
            for row in self.rows
        ]
        return {"control_is": self.control_is, "rows": rows, "thresholds": list(self.thresholds)}

    def table(self) -> str:
        """Losses by source, and how far the sparse model is from its control."""
        header = ("held-out text", "tokens", "original", "control", "sparse", "- control", "sparsity")
        lines = [header, *map(_cells, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([*text, f"losses in nats a token; the control is {self.control_is}"])


def _cells(row: Row) -> tuple[str, ...]:
    beside = row.original if row.control is None else row.control
    control = "-" if row.control is None else f"{row.control:.4f}"
    return (
        Path(row.source).name or row.source,
        f"{row.tokens:,}",
        f"{row.original:.4f}",
        control,
        f"{row.sparse:.4f}",
        f"{row.sparse - beside:+.4f}",
        f"{np.mean(row.layers):.1%}",
    )


def held_out(mixtures: Sequence[Mixture]) -> dict[str, Batch]:
    """Each source's text that was not trained on; sources that spare none are left out."""
    batches = {}
    for mixture in mixtures:
        for i, source in enumerate(mixture.sources):
            batch = mixture.held_out(i)
            if batch is not None and source not in batches and batch.loss[:, 1:].any():
                batches[source] = batch
    return batches


def measured(
    trunk: "Trunk", batches: Mapping[str, Batch], micro: int, bfloat16: bool
) -> dict[str, "Measured"]:
    """Loss and sparsity on each source."""
    import torch

    from prosparse.sparsify.measure import measure

    # what was compiled for training is not compiled again for a few batches of other shapes
    with torch.compiler.set_stance("force_eager"):
        return {
            source: measure(trunk, batch, micro=micro, bfloat16=bfloat16) for source, batch in batches.items()
        }


def make(
    original: Mapping[str, "Measured"],
    control: Mapping[str, "Measured"] | None,
    sparse: Mapping[str, "Measured"],
    control_is: str,
    thresholds: Sequence[float],
) -> Report:
    rows = [
        Row(
            source,
            got.tokens,
            original[source].loss,
            control[source].loss if control else None,
            got.loss,
            got.sparsity.tolist(),
        )
        for source, got in sparse.items()
    ]
    return Report(control_is, rows, thresholds)


def write(report: Report, folder: Path) -> None:
    """`report.json`, and `layers.png` where matplotlib is installed."""
    with written_whole(folder / "report.json") as file:
        file.write(json.dumps(report.to_json(), indent=1).encode() + b"\n")
    if report.rows:
        try:
            from prosparse.sparsify.plot import plot_layers

            plot_layers(report, folder / "layers.png")
        except ImportError:
            print("no layers.png: install matplotlib")
