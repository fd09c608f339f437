"""Curves of a training run, from its metrics.jsonl.

python -m prosparse.sparsify.plot RUN/metrics.jsonl RUN/metrics.png
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse.formats.files import written_whole

if TYPE_CHECKING:
    from prosparse.sparsify.presets import Preset
    from prosparse.sparsify.report import Report


def plot(metrics: Path, target: Path) -> None:
    """Losses, sparsity (measured and wanted) and lambda over tokens, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not lines:
        raise ValueError(f"{metrics} holds no steps")
    tokens = [line["tokens"] / 1e6 for line in lines]
    figure, (loss, sparsity) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    for name, label in (("next_token", "next token"), ("kl", "KL to the original")):
        loss.plot(tokens, [line[name] for line in lines], label=label, linewidth=0.8)
    loss.set(xlabel="tokens, millions", ylabel="nats", yscale="log")
    loss.legend()
    sparsity.plot(tokens, [line["sparsity"] for line in lines], label="sparsity", linewidth=0.8)
    wanted = [
        (t, line["wanted"]) for t, line in zip(tokens, lines, strict=True) if line["wanted"] is not None
    ]
    if wanted:
        sparsity.plot(*zip(*wanted, strict=True), ":", label="wanted")
    sparsity.set(xlabel="tokens, millions", ylim=(0, 1))
    if any(line["lambda"] for line in lines):
        factor = sparsity.twinx()
        factor.plot(tokens, [line["lambda"] for line in lines], "--", color="tab:gray", linewidth=0.8)
        factor.set_ylabel("lambda (dashed)")
    sparsity.legend(loc="lower right")
    _save(figure, target)


def plot_layers(report: "Report", target: Path) -> None:
    """Sparsity of each layer, over all held-out text and by source, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for row in report.rows:
        axes.plot(row.layers, linewidth=0.8, alpha=0.6, label=Path(row.source).name)
    axes.bar(range(len(report.layers)), report.layers, color="tab:gray", alpha=0.4, label="all")
    axes.set(xlabel="layer", ylabel="sparsity on held-out text", ylim=(0, 1))
    axes.legend(loc="lower right", fontsize="x-small")
    _save(figure, target)


def plot_schedule(preset: "Preset", target: Path) -> None:
    """lambda and the learning rate of a preset over its steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, preset.schedule.total_steps + 1, max(1, preset.schedule.total_steps // 1000))
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    axes.plot(steps, [preset.schedule.at(step) for step in steps])
    axes.set(xlabel="step", ylabel="lambda", title=preset.name)
    rate = axes.twinx()
    rate.plot(steps, [preset.learning_rate.at(step) for step in steps], ":", color="tab:gray")
    rate.set_ylabel("learning rate (dotted)")
    _save(figure, target)


def _save(figure: Any, target: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    with written_whole(target) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
