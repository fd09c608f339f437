"""COPA: the likelier cause or effect (Roemmele et al., 2011; SuperGLUE's split)."""

from pathlib import Path

from prosparse.evaluate.tasks.reading import Item, rows

_CONNECTORS = ("because", "therefore")


def load(folder: Path) -> list[Item]:
    """The validation set: `val.jsonl`."""
    items = []
    for row in rows(folder / "val.jsonl"):
        connector = _CONNECTORS[row.index("question", ("cause", "effect"))]
        context = f"{row.text('premise').strip()[:-1]} {connector}"  # without the full stop
        choices = [row.text(name) for name in ("choice1", "choice2")]
        pairs = tuple((context, choice[0].lower() + choice[1:]) for choice in choices)
        items.append(Item(pairs, row.index("label", (0, 1))))
    return items
