"""BoolQ: yes or no, by a passage (Clark et al., arXiv 1905.10044)."""

from pathlib import Path

from prosparse.evaluate.tasks.reading import Item, rows


def load(folder: Path) -> list[Item]:
    """The development set: `dev.jsonl`."""
    items = []
    for row in rows(folder / "dev.jsonl"):
        context = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
        items.append(Item(((context, "no"), (context, "yes")), row.index("answer", (False, True))))
    return items
