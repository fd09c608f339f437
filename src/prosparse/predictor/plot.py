"""Curves of a report: what recall costs in candidates, and what bytes cost in perplexity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prosparse.formats.files import written_whole


def plot(report: Mapping[str, Any], target: Path) -> None:
    """Predicted sparsity over recall, perplexity over FFN bytes, recall by layer at the default; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (trade, cost, by_layer) = pyplot.subplots(1, 3, figsize=(13, 3.8))
    dense = report["dense_ffn_bytes"]
    for way, found in report["ways"].items():
        points = [point for point in found["points"] if point["asked"] is not None]
        xs = [100 * point["recall"] for point in points]
        (line,) = trade.plot(
            xs, [100 * p["predicted_sparsity"] for p in points], "o-", ms=3, lw=0.9, label=way
        )
        measured = [point for point in found["points"] if point["ppl_ratio"] is not None]
        with_recall = [point for point in measured if point["asked"] is not None]
        cost.plot(
            [100 * point["ffn_bytes"] / dense for point in with_recall],
            [100 * (point["ppl_ratio"] - 1) for point in with_recall],
            "o-",
            ms=3,
            lw=0.9,
            color=line.get_color(),
            label=way,
        )
        for point in found["points"]:
            if point["asked"] is None:
                at = 100 * point["recall"], 100 * point["predicted_sparsity"]
                trade.plot(*at, "x", color=line.get_color(), label=f"{way}, threshold 0")
        default = next(p for p in points if p["asked"] == found["default"])
        color = line.get_color()
        by_layer.plot([100 * v for v in default["layer_recall"]], lw=0.9, color=color, label=f"{way}: recall")
        by_layer.plot(
            [100 * v for v in default["layer_predicted_sparsity"]],
            ":",
            lw=0.9,
            color=color,
            label=f"{way}: predicted sparsity",
        )
    trade.axhline(100 * report["sparsity"], color="tab:gray", ls=":", lw=0.8, label="sparsity")
    trade.set(xlabel="activation recall, %", ylabel="predicted sparsity, %")
    exact = 100 * report["exact_ffn_bytes"] / dense
    cost.axvline(exact, color="tab:gray", ls=":", lw=0.8, label="exact mode")
    cost.set(xlabel="FFN bytes a token, % of dense", ylabel="perplexity, % above exact")
    by_layer.plot([100 * v for v in report["layer_sparsity"]], color="tab:gray", lw=0.8, label="sparsity")
    by_layer.set(xlabel="layer", ylabel="at the default recall, %")
    for axes in (trade, cost, by_layer):
        axes.legend(fontsize=6)
    figure.tight_layout()
    with written_whole(target) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
