"""Social IQa: what people in a situation do, want or feel (Sap et al., arXiv 1904.09728)."""

from pathlib import Path

from prosparse.evaluate.tasks.reading import Item, labels, rows


def load(folder: Path) -> list[Item]:
    """The development set: `dev.jsonl` and `dev-labels.lst`."""
    items = rows(folder / "dev.jsonl")
    gold = labels(folder / "dev-labels.lst", ("1", "2", "3"), len(items))
    return [
        Item(
            tuple(
                (f"Q: {row.text('context')} {row.text('question')}\nA:", row.text(f"answer{letter}"))
                for letter in "ABC"
            ),
            label,
        )
        for row, label in zip(items, gold, strict=True)
    ]
