"""Rows out of every kind of file, and what is said of bad ones."""

import gzip
import json

import pytest

from prosparse.sparsify.corpus import Source, row_of, rows

DOCUMENTS = ["one", "zwei\n", "三 🙂"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


def test_packed_or_not(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(LINES))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert list(rows(str(tmp_path / name))) == DOCUMENTS
    assert list(rows(str(tmp_path))) == DOCUMENTS * 3, "a folder is its files in order"


def test_text_and_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.txt").write_text("whole file\nis one document", encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "b.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert list(rows(str(tmp_path))) == ["whole file\nis one document", *DOCUMENTS]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "response": "a", "source": "x"},
        {"instruction": "q", "input": "", "output": "a"},
    ],
)
def test_conversations(fields):
    assert row_of(fields, "here") == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b'{"text": "a"}\n{"txet": "b"}\n', r"line 2 has txet; a row needs"),
        (b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 is not UTF-8: byte 10 is 0xff"),
        (b'{"text": 5}\n', r"line 1 has text"),
        (b'{"messages": []}\n', r"line 1 has messages"),
        (b'{"messages": [{"role": "user"}]}\n', r"line 1 has a message without role and content"),
        (b"[1, 2]\n", r"line 1 has list"),
    ],
)
def test_bad_rows_are_named(tmp_path, data, match):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=match):
        list(rows(str(tmp_path / "a.jsonl")))


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list(rows(str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="no data that can be read"):
        list(rows(str(tmp_path)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="not a parquet file"):
        list(rows(str(tmp_path)))


def test_sources_with_weights():
    assert Source.parse("a/b.jsonl") == Source("a/b.jsonl", 1.0)
    assert Source.parse("a/b.jsonl:0.25") == Source("a/b.jsonl", 0.25)
    assert Source.parse("hf:org/name#config@train:2") == Source("hf:org/name#config@train", 2.0)
    assert Source.parse("hf:org/name") == Source("hf:org/name")
    for text in ("a:0", "a:-1", "a:nan", ""):
        with pytest.raises(ValueError, match=r"weight|path"):
            Source.parse(text)
