"""WinoGrande: whom a pronoun means (Sakaguchi et al., arXiv 1907.10641), by partial scoring."""

from pathlib import Path

from prosparse.evaluate.tasks.reading import Item, rows


def load(folder: Path) -> list[Item]:
    """The development set: `dev.jsonl`. Options stand in the context; what follows the blank is scored."""
    items = []
    for row in rows(folder / "dev.jsonl"):
        before, blank, after = row.text("sentence").partition("_")
        if not blank or not after.strip():
            raise row.error("field 'sentence' must hold a blank, _, and text after it")
        pairs = tuple((before + row.text(name), after.strip()) for name in ("option1", "option2"))
        items.append(Item(pairs, row.index("answer", ("1", "2"))))
    return items
