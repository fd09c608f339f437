"""Items of benchmarks, and reading them: what is wrong with a file is a ValueError that names its line."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """One question: texts of which each is scored as log P(" " + option | context); `gold` is the right one.

    A single pair has nothing to choose from: it is right if greedy decoding says the option.
    """

    pairs: tuple[tuple[str, str], ...]  # (context, option without its leading space)
    gold: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a JSON Lines file."""

    values: dict[str, Any]
    where: str  # "file, line n"

    def text(self, name: str) -> str:
        """The field, which must be a text that is not blank."""
        value = self._value(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"field {name!r} must be a text, not {value!r}")
        return value

    def texts(self, name: str) -> list[str]:
        """The field, which must be a list of at least two texts."""
        values = self._value(name)
        if (
            not isinstance(values, list)
            or len(values) < 2
            or not all(isinstance(v, str) and v.strip() for v in values)
        ):
            raise self.error(f"field {name!r} must be a list of texts, not {values!r}")
        return values

    def index(self, name: str, allowed: Sequence[Any]) -> int:
        """Where the field's value is in `allowed`. 1 is not true here, and "1" is not 1."""
        value = self._value(name)
        for index, candidate in enumerate(allowed):
            if type(value) is type(candidate) and value == candidate:
                return index
        raise self.error(f"field {name!r} must be one of {json.dumps(list(allowed))}, not {value!r}")

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}; get the file anew from where the benchmark is published")

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise self.error(f"field {name!r} is missing")
        return self.values[name]


def rows(path: Path) -> list[Row]:
    """The lines of a JSON Lines file, one object each."""
    result = []
    for where, line in _lines(path):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}): get the file anew") from None
        if not isinstance(values, dict):
            raise ValueError(f"{where}: must be a JSON object, not {line[:40]!r}: get the file anew")
        result.append(Row(values, where))
    return result


def labels(path: Path, allowed: Sequence[str], count: int) -> list[int]:
    """Of `count` lines, where each is in `allowed`."""
    result = []
    for where, line in _lines(path):
        if line.strip() not in allowed:
            raise ValueError(f"{where}: a label is one of {', '.join(allowed)}, not {line!r}")
        result.append(allowed.index(line.strip()))
    if len(result) != count:
        raise ValueError(f"{path} has {len(result)} labels for {count} items: get both files anew, together")
    return result


def text(path: Path) -> str:
    """A whole file, UTF-8."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} is missing: --data-dir is the folder of the benchmarks' folders (docs/evaluation.md)"
        ) from None
    if not data.strip():
        raise ValueError(f"{path} is empty: get the file anew")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}): save the file as UTF-8") from None


def _lines(path: Path) -> list[tuple[str, str]]:
    """("file, line n", line); only "\\n" ends a line, as JSON texts may hold the other line ends."""
    lines = text(path).removesuffix("\n").split("\n")
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]
