"""Curves of a training run, from its metrics.jsonl.

python -m prosparse.sparsify.plot RUN/metrics.jsonl RUN/metrics.png
"""

import json
import sys
from pathlib import Path


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
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
