"""Rows of training text out of files, folders and Hugging Face data sets.

A row is a document (`text`) or a conversation (`messages`, `prompt` and `response`, `instruction` and
`output`, or ShareGPT's `conversations`). Files: .jsonl and .txt, also as .gz and .zst, and .parquet.
"""

import gzip
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

Row = str | list[dict[str, str]]  # a document, or the messages of a conversation

_TEXT, _ROWS = (".txt", ".md", ".rst", ".py"), (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst")
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from, a file, a folder or `hf:NAME[#CONFIG][@SPLIT]`, and its share of the mix."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a data source needs a path")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of {self.path} must be positive, not {self.weight}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`PATH` or `PATH:WEIGHT`."""
        path, colon, weight = text.rpartition(":")
        try:
            return cls(path, float(weight)) if colon else cls(text)
        except ValueError as error:
            if "could not convert" not in str(error):
                raise
            return cls(text)  # the colon is part of the path


def files(path: str | Path) -> list[Path]:
    """The files a source's rows are in, sorted; ValueError if there is none that can be read."""
    root = Path(path)
    if not root.exists():
        raise ValueError(f"{path} does not exist; data is a file, a folder, or hf:NAME for a data set")
    found = sorted(p for p in root.rglob("*") if p.is_file() and _kind(p)) if root.is_dir() else [root]
    if not found or not _kind(found[0]):
        known = ", ".join((*_ROWS, *_TEXT, ".parquet"))
        raise ValueError(f"{path} holds no data that can be read: {known}, the first two kinds also packed")
    return found


def rows(path: str) -> Iterator[Row]:
    """All rows of a source in file order. ValueError names the place of the first bad one."""
    if path.startswith("hf:"):
        for i, fields in enumerate(_dataset(path.removeprefix("hf:"))):
            yield row_of(fields, f"{path}, row {i + 1}")
        return
    for file in files(path):
        match _kind(file):
            case "rows":
                yield from _json_rows(file)
            case "text":
                with _open(file) as stream:
                    yield _decode(stream.read(), str(file))
            case "parquet":
                yield from _parquet_rows(file)


def row_of(fields: Any, where: str) -> Row:
    """A row from the fields of one JSON object."""
    match fields:
        case {"text": str(text)}:
            return text
        case {"messages": [*messages]} if messages:
            return [_message(m, "role", "content", where) for m in messages]
        case {"conversations": [*messages]} if messages:
            return [_message(m, "from", "value", where) for m in messages]
        case {"prompt": str(prompt), "response": str(response)}:
            return _turn(prompt, response)
        case {"instruction": str(prompt), "output": str(response)}:
            given = fields.get("input") or ""
            return _turn(f"{prompt}\n\n{given}" if given else prompt, response)
    names = ", ".join(fields) if isinstance(fields, Mapping) else type(fields).__name__
    raise ValueError(
        f"{where} has {names or 'no fields'}; a row needs text, messages, prompt and response, "
        "or instruction and output"
    )


def _turn(prompt: str, response: str) -> Row:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _message(message: Any, role_key: str, text_key: str, where: str) -> dict[str, str]:
    role = message.get(role_key) if isinstance(message, Mapping) else None
    role = _SHAREGPT.get(role, role) if isinstance(role, str) else None
    if role is None or not isinstance(message.get(text_key), str):
        raise ValueError(f"{where} has a message without {role_key} and {text_key}")
    return {"role": role, "content": message[text_key]}


def _kind(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s not in _PACKED]
    last = suffixes[-1].lower() if suffixes else ""
    if last in _ROWS:
        return "rows"
    if last in _TEXT:
        return "text"
    return "parquet" if path.suffix.lower() == ".parquet" else None


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path} needs the package zstandard: pip install 'prosparse[train]'") from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True))
    return path.open("rb")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None


def _json_rows(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                fields = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            yield row_of(fields, where)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path} needs the package pyarrow: pip install 'prosparse[train]'") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for fields in batch.to_pylist():
                number += 1
                yield row_of(fields, f"{path}, row {number}")
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from None


def _dataset(name: str) -> Iterator[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"hf:{name} needs the package datasets: pip install 'prosparse[train]'") from None
    name, _, split = name.partition("@")
    name, _, config = name.partition("#")
    return iter(load_dataset(name, config or None, split=split or "train", streaming=True))
