"""Benchmark folders of a few items, in the published formats."""

import json
from pathlib import Path
from typing import Any

ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa/valid.jsonl": [
        {"goal": "open a jar", "sol1": "twist the lid ", "sol2": "twist the jar's bottom"},
        {"goal": "dry a cup?", "sol1": "use a towel", "sol2": "use a towel"},
        {"goal": "é", "sol1": "ß", "sol2": "a"},
    ],
    "siqa/dev.jsonl": [
        {"context": "Al ran.", "question": "Why?", "answerA": "late", "answerB": "fun", "answerC": "x"},
        {"context": "Bo sat.", "question": "And now?", "answerA": "b", "answerB": "c", "answerC": "d"},
    ],
    "hellaswag/hellaswag_val.jsonl": [
        {
            "activity_label": "Cooking",
            "ctx_a": "He cuts. [header] How [title] Cut",
            "ctx_b": "the man",
            "endings": ["[step] eats  it.", "runs [substeps] off", "stops", "a"],
            "label": 2,
        },
        {"activity_label": "Go", "ctx_a": "On. [title] ", "ctx_b": "", "endings": ["a", "b"], "label": 0},
    ],
    "winogrande/dev.jsonl": [
        {"sentence": "Ann beat Eve so _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {"sentence": "_ fell off the desk", "option1": "It", "option2": "She", "answer": "2"},
    ],
    "copa/val.jsonl": [
        {
            "premise": "It fell. ",
            "choice1": "It broke.",
            "choice2": "I ate.",
            "question": "effect",
            "label": 0,
        },
        {"premise": "I ran.", "choice1": "I was late.", "choice2": "No.", "question": "cause", "label": 1},
    ],
    "boolq/dev.jsonl": [
        {"question": "is it so", "passage": "It is so.", "answer": True},
        {"question": "is it not", "passage": "It is so. " * 9, "answer": False},
    ],
    "lambada/lambada_test.jsonl": [{"text": "he said, \u201cI see it"}, {"text": "alone"}],
}
LABELS = {"piqa/valid-labels.lst": "0\n1\n1\n", "siqa/dev-labels.lst": "1\n3\n"}
TEXT = "wikitext2/wiki.test.raw.lf"


def write(folder: Path) -> Path:
    """All eight benchmarks under `folder`."""
    for name, rows in ROWS.items():
        put(folder, name, "".join(json.dumps(row) + "\n" for row in rows))
    for name, text in LABELS.items():
        put(folder, name, text)
    put(folder, TEXT, " \n = A title = \n \n It is of no importance . \n" * 20)
    return folder


def put(folder: Path, name: str, text: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
