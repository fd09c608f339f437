"""LAMBADA: the last word of a passage (Paperno et al., arXiv 1606.06031; OpenAI's test set)."""

from pathlib import Path

from prosparse.evaluate.tasks.reading import Item, rows


def load(folder: Path) -> list[Item]:
    """The test set: `lambada_test.jsonl`."""
    items = []
    for row in rows(folder / "lambada_test.jsonl"):
        context, _, word = row.text("text").rpartition(" ")
        if not word:
            raise row.error("field 'text' must end in a word")
        items.append(Item(((context, word),)))
    return items
