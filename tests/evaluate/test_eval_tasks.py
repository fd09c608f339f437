"""Prompts as lm-evaluation-harness words them, published sizes, and what is said about damaged files."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from benchmarks_data import LABELS, ROWS, TEXT, put, write

from prosparse.evaluate.tasks import TASKS, wikitext2
from prosparse.evaluate.tasks.hellaswag import clean

EXPECTED = {
    "piqa": [
        (
            [
                ("Question: open a jar\nAnswer:", "twist the lid "),
                ("Question: open a jar\nAnswer:", "twist the jar's bottom"),
            ],
            0,
        ),
        ([("Question: dry a cup?\nAnswer:", "use a towel")] * 2, 1),
        ([("Question: é\nAnswer:", "ß"), ("Question: é\nAnswer:", "a")], 1),
    ],
    "siqa": [
        ([("Q: Al ran. Why?\nA:", "late"), ("Q: Al ran. Why?\nA:", "fun"), ("Q: Al ran. Why?\nA:", "x")], 0),
        ([("Q: Bo sat. And now?\nA:", option) for option in "bcd"], 2),
    ],
    "hellaswag": [
        (
            [
                ("Cooking: He cuts. How. Cut The man", option)
                for option in (" eats it.", "runs off", "stops", "a")
            ],
            2,
        ),
        ([("Go: On.. ", "a"), ("Go: On.. ", "b")], 0),
    ],
    "winogrande": [
        ([("Ann beat Eve so Ann", "won."), ("Ann beat Eve so Eve", "won.")], 0),
        ([("It", "fell off the desk"), ("She", "fell off the desk")], 1),
    ],
    "copa": [
        ([("It fell therefore", "it broke."), ("It fell therefore", "i ate.")], 0),
        ([("I ran because", "i was late."), ("I ran because", "no.")], 1),
    ],
    "boolq": [
        ([("It is so.\nQuestion: is it so?\nAnswer:", option) for option in ("no", "yes")], 1),
        ([("It is so. " * 9 + "\nQuestion: is it not?\nAnswer:", option) for option in ("no", "yes")], 0),
    ],
    "lambada": [([("he said, \u201cI see", "it")], 0), ([("", "alone")], 0)],
}
PUBLISHED = {
    "piqa": 1838,
    "siqa": 1954,
    "hellaswag": 10042,
    "winogrande": 1267,
    "copa": 100,
    "boolq": 3270,
    "lambada": 5153,
}


@pytest.mark.parametrize("name", TASKS)
def test_prompts(name, tmp_path):
    items = TASKS[name].load(write(tmp_path) / name)
    assert [(list(item.pairs), item.gold) for item in items] == EXPECTED[name]


def test_headings_of_wikihow_go_as_in_lm_evaluation_harness():
    """Each mark takes one blank of a doubled one with it, once."""
    assert clean("  How to [title] Do it. [step] First [substeps] second  third ") == (
        "How to. Do it. First second third"
    )


def test_text(tmp_path):
    write(tmp_path)
    assert wikitext2.load(tmp_path / "wikitext2").encode() == (tmp_path / TEXT).read_bytes()


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    row = ROWS["boolq/dev.jsonl"][0] | {"passage": "a\u2028b\x85c"}
    put(tmp_path, "dev.jsonl", json.dumps(row, ensure_ascii=False) + "\r\n")
    (item,) = TASKS["boolq"].load(tmp_path)
    assert item.pairs[0][0].startswith("a\u2028b\x85c\n")


def changed(name: str, line: int, **fields) -> str:
    rows = [dict(row) for row in ROWS[name]]
    for field, value in fields.items():
        if value is None:
            del rows[line][field]
        else:
            rows[line][field] = value
    return "".join(json.dumps(row) + "\n" for row in rows)


DAMAGED = {
    "field missing": ("piqa/valid.jsonl", changed("piqa/valid.jsonl", 1, sol2=None), "line 2: .*'sol2'"),
    "not a text": ("siqa/dev.jsonl", changed("siqa/dev.jsonl", 1, answerC=7), "line 2: .*'answerC'.* 7"),
    "blank text": ("copa/val.jsonl", changed("copa/val.jsonl", 0, premise=" "), "line 1: .*'premise'"),
    "label of another type": (
        "copa/val.jsonl",
        changed("copa/val.jsonl", 1, label=True),
        "line 2: .*'label'",
    ),
    "label too great": (
        "hellaswag/hellaswag_val.jsonl",
        changed("hellaswag/hellaswag_val.jsonl", 1, label=2),
        r"line 2: .*'label' .*\[0, 1\]",
    ),
    "number as answer": ("boolq/dev.jsonl", changed("boolq/dev.jsonl", 0, answer=1), "line 1: .*false, true"),
    "ctx_b": (
        "hellaswag/hellaswag_val.jsonl",
        changed("hellaswag/hellaswag_val.jsonl", 0, ctx_b=None),
        "line 1: .*'ctx_b'",
    ),
    "endings": (
        "hellaswag/hellaswag_val.jsonl",
        changed("hellaswag/hellaswag_val.jsonl", 0, endings=["a"]),
        "line 1: .*'endings'",
    ),
    "no blank": (
        "winogrande/dev.jsonl",
        changed("winogrande/dev.jsonl", 1, sentence="It fell."),
        "line 2: .*blank",
    ),
    "nothing after the blank": (
        "winogrande/dev.jsonl",
        changed("winogrande/dev.jsonl", 0, sentence="It _ "),
        "line 1: .*text after it",
    ),
    "unknown question": ("copa/val.jsonl", changed("copa/val.jsonl", 0, question="why"), "line 1: .*effect"),
    "no last word": (
        "lambada/lambada_test.jsonl",
        changed("lambada/lambada_test.jsonl", 0, text="he "),
        "line 1: .*end in a word",
    ),
    "wrong label": ("piqa/valid-labels.lst", "0\n2\n1\n", "labels.lst, line 2: a label is one of 0, 1"),
    "labels missing": ("siqa/dev-labels.lst", "1\n", "1 labels for 2 items"),
    "not JSON": ("boolq/dev.jsonl", "{}\n{\n", "line 1: .*'passage'|line 2: not JSON"),
    "not an object": ("boolq/dev.jsonl", "[1]\n", "line 1: must be a JSON object"),
    "blank line": ("copa/val.jsonl", changed("copa/val.jsonl", 0) + "\n{}\n", "line 3: not JSON"),
    "empty": ("winogrande/dev.jsonl", "\n", "empty"),
    "empty labels": ("piqa/valid-labels.lst", "", "empty"),
    "not UTF-8": (
        "lambada/lambada_test.jsonl",
        b'{"text": "a b"}\n{"text": "\xff b"}\n',
        "line 2: not UTF-8",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case, tmp_path):
    write(tmp_path)
    name, content, message = DAMAGED[case]
    put(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as error:
        TASKS[name.split("/")[0]].load(tmp_path / name.split("/")[0])
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", TASKS)
def test_missing_files(name, tmp_path):
    with pytest.raises(ValueError, match=r"missing: --data-dir"):
        TASKS[name].load(tmp_path / name)


@pytest.mark.parametrize(("content", "message"), [(b"", "empty"), (b"a\nb\xff", "line 2: not UTF-8")])
def test_damaged_text(content, message, tmp_path):
    put(tmp_path, TEXT, content)
    with pytest.raises(ValueError, match=message):
        wikitext2.load(tmp_path / "wikitext2")


def test_published_sizes(tmp_path):
    """Every published item is read."""
    shared = Path(os.environ.get("PROSPARSE_SHARED", Path(__file__).parents[3] / "shared"))
    archive = shared / "data" / "eval.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive} does not exist; set PROSPARSE_SHARED to its folder")
    wanted = {*ROWS, *LABELS}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.removeprefix("eval/") in wanted:
                tar.extract(member, tmp_path, filter="data")
    found = {name: len(task.load(tmp_path / "eval" / name)) for name, task in TASKS.items()}
    assert found == PUBLISHED
