"""Training checkpoints: folders that appear whole or not at all, newest kept.

Written by torch.distributed.checkpoint: any number of processes reads what any other number has written.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from prosparse.sparsify.distributed import World

_NAME = re.compile(r"step-(\d{8})")


def save(folder: Path, step: int, state: dict[str, Tensor], world: World, keep: int = 2) -> Path:
    """Writes `state` as step `step` of `folder`, and removes all but the `keep` newest."""
    target = folder / f"step-{step:08d}"
    part = folder / f".{target.name}.part"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    world.wait()
    try:
        with _silent():
            dcp.save(state, checkpoint_id=part, no_dist=world.size == 1)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, Exception) and (cause := _system_error(error)):
            raise OSError(cause.errno, f"{cause.strerror} while writing checkpoint", str(target)) from error
        raise
    world.wait()
    if world.is_main:
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
        _sync(folder)
        for old in _all(folder)[:-keep]:
            shutil.rmtree(old)
    world.wait()
    return target


def latest(folder: Path, world: World) -> Path | None:
    """The newest checkpoint, or None. Half-written ones are cleared away."""
    if world.is_main:
        for part in folder.glob(".step-*"):
            shutil.rmtree(part)
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path, state: dict[str, Tensor], world: World) -> int:
    """Fills the tensors of `state`, which must be those that were saved; the step it was saved at."""
    with _silent():
        dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    return int(path.name.removeprefix("step-"))


@contextmanager
def _silent() -> Iterator[None]:
    """Without the library's warning that one process alone writes or reads, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _system_error(error: BaseException) -> OSError | None:
    """The disk's own complaint, out of what the library wraps it in."""
    seen: list[BaseException] = [error]
    for e in seen:
        if isinstance(e, OSError):
            return e
        inner = [e.__cause__, e.__context__, *getattr(e, "failures", {}).values()]
        seen += [i[0] if isinstance(i, tuple) else i for i in inner if i is not None and i not in seen]
    return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
