"""PIQA: which of two ways reaches a physical goal (Bisk et al., arXiv 1911.11641)."""

from pathlib import Path

from prosparse.evaluate.tasks.reading import Item, labels, rows


def load(folder: Path) -> list[Item]:
    """The validation set: `valid.jsonl` and `valid-labels.lst`."""
    items = rows(folder / "valid.jsonl")
    gold = labels(folder / "valid-labels.lst", ("0", "1"), len(items))
    return [
        Item(
            tuple((f"Question: {row.text('goal')}\nAnswer:", row.text(name)) for name in ("sol1", "sol2")),
            label,
        )
        for row, label in zip(items, gold, strict=True)
    ]
