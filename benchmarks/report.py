"""Results of `cpu_decode` as JSON, a Markdown table and a plot.

python -m benchmarks.report benchmarks/results/cpu_decode_....json    prints the table of the README
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("llama.cpp", "PyTorch bf16", "dense", "exact")


def save(results: dict[str, Any], stem: Path) -> None:
    """Write `stem`.json, .md and .png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    machine = results["machine"]
    heading = f"{machine['cpu']}, {machine['cores']} cores ({machine['isa']}), {machine['date']}"
    stem.with_suffix(".md").write_text(f"{heading}: `{results['command']}`\n\n{table(results['rows'])}")
    plot(results["rows"], heading, stem.with_suffix(".png"))


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    speeds = "  ".join(f"{name} {system['tok_s']:.1f}" for name, system in row["systems"].items())
    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
    noise = max(system["noise"] for system in row["systems"].values())
    warning = f"  NOISY: others used {noise:.0%} of a core" if noise > 0.1 else ""
    what = f"{row['shape']} {row['type']} -t {row['threads']}, {row['sparsity']:.0%} inactive"
    return f"{what}:  {speeds} tok/s;  {ratios}{warning}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Tokens a second by system, ratios, share of the bandwidth; one line a case."""
    head = [
        "model",
        "type",
        "threads",
        "inactive",
        *(f"{name} tok/s" for name in COLUMNS),
        "dense ÷ llama.cpp",
        "exact ÷ llama.cpp",
        "exact ÷ dense",
        "byte bound",
        "share of it",
        "GB/s measured",
        "share: llama.cpp",
        "share: dense",
        "share: exact",
        "pp128 dense ÷ llama.cpp",
    ]
    lines = [head, ["---"] * 4 + ["---:"] * (len(head) - 4)]
    for row in rows:
        systems, ratios = row["systems"], row["ratios"]
        gain = ratios.get("exact/dense")
        lines.append(
            [
                row["shape"],
                row["type"].upper(),
                str(row["threads"]),
                f"{row['sparsity']:.0%}",
                *(_cell(systems.get(name, {}).get("tok_s"), ".1f") for name in COLUMNS),
                *(_cell(ratios.get(name), ".2f") for name in ("dense/llama.cpp", "exact/llama.cpp")),
                _cell(gain, ".2f"),
                _cell(gain and row["byte_bound"], ".2f"),
                _cell(gain and gain / row["byte_bound"], ".0%"),
                f"{row['bandwidth_gb_s']:.1f}",
                *(
                    _cell(systems.get(name, {}).get("bandwidth_share"), ".0%")
                    for name in ("llama.cpp", "dense", "exact")
                ),
                _cell(row["prefill_ratios"].get("dense/llama.cpp"), ".2f"),
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# the README's lines: shape, type, wanted share of inactive neurons (None: the model's own)
SUMMARY = (
    ("smollm2", "q8_0", None),
    ("sparse", "q5_1", None),
    ("demo", "q8_0", None),
    ("1b", "q8_0", 0.88),
    ("1b", "q4_0", 0.88),
    ("1b", "bf16", 0.88),
    ("7b", "q8_0", 0.88),
    ("7b", "q4_0", 0.88),
)
TITLES = {
    "smollm2": "SmolLM2-135M",
    "sparse": "SmolLM2-135M, ReLU-sparse",
    "demo": "SmolLM2-135M, sparse (`-m demo`)",
    "1b": "MiniCPM-1B shape",
    "7b": "LLaMA2-7B shape, 8 layers",
}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The README's table: `SUMMARY` at most threads."""
    threads = max(row["threads"] for row in rows)
    head = [
        f"model, {threads} threads",
        "type",
        "inactive",
        "llama.cpp",
        "dense twin",
        "exact",
        "dense ÷ llama.cpp",
        "exact ÷ llama.cpp",
        "exact ÷ dense (byte bound)",
    ]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for shape, type, share in SUMMARY:
        for row in rows:
            if (row["shape"], row["type"], row["threads"]) != (shape, type, threads):
                continue
            if share is not None and abs(row["sparsity"] - share) > 0.02:
                continue
            systems, ratios = row["systems"], row["ratios"]
            exact = "exact" in systems
            bound = f"{ratios['exact/dense']:.2f} ({row['byte_bound']:.2f})" if exact else "-"
            lines.append(
                [
                    TITLES[shape],
                    type.upper(),
                    f"{row['sparsity']:.0%}",
                    *(_cell(systems.get(n, {}).get("tok_s"), ".0f") for n in ("llama.cpp", "dense", "exact")),
                    *(_cell(ratios.get(n), ".2f") for n in ("dense/llama.cpp", "exact/llama.cpp")),
                    bound,
                ]
            )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(rows: Sequence[dict[str, Any]], heading: str, path: Path) -> None:
    """Tokens a second over the share of inactive neurons at most threads, a panel for each shape and type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = max(row["threads"] for row in rows)
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["threads"] == threads:
            panels.setdefault(f"{row['shape']} {row['type'].upper()}", []).append(row)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.6 * columns, 3.0 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, cases) in zip(axes.flat, panels.items(), strict=False):
        for name, colour in zip(COLUMNS, ("tab:gray", "tab:olive", "tab:blue", "tab:red"), strict=True):
            points = [(r["sparsity"], r["systems"][name]["tok_s"]) for r in cases if name in r["systems"]]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        bound = [(r["sparsity"], r["systems"]["dense"]["tok_s"] * r["byte_bound"]) for r in cases]
        axis.plot(*zip(*bound, strict=True), ":", color="tab:red", label="byte bound")
        axis.set(title=title, xlabel="inactive neurons", xlim=(-0.05, 1.0))
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("tokens / s")
    axes[0][0].legend(fontsize="x-small")
    figure.suptitle(f"Decoding, {threads} threads: {heading}", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())["rows"]), end="")
