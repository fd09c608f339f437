"""HellaSwag: how a scene goes on (Zellers et al., arXiv 1905.07830)."""

import re
from pathlib import Path

from prosparse.evaluate.tasks.reading import Item, rows


def load(folder: Path) -> list[Item]:
    """The validation set: `hellaswag_val.jsonl`. `ctx_b` is empty in many items."""
    items = []
    for row in rows(folder / "hellaswag_val.jsonl"):
        begun = row.values.get("ctx_b")
        if not isinstance(begun, str):
            raise row.error(f"field 'ctx_b' must be a text, not {begun!r}")
        context = clean(f"{row.text('activity_label')}: {row.text('ctx_a')} {begun.capitalize()}")
        endings = row.texts("endings")
        gold = row.index("label", range(len(endings)))
        items.append(Item(tuple((context, clean(ending)) for ending in endings), gold))
    return items


def clean(text: str) -> str:
    """Without the marks of WikiHow's headings, as lm-evaluation-harness removes them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
