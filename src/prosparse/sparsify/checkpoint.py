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
        # CheckpointException is none of the Exceptions
        if not isinstance(error, (Exception, dcp.CheckpointException)):
            raise
        # what the library raises seldom names the disk: its archive writer loses the system's own error
        reason = str(_innermost(error)).strip().splitlines()[-1:]
        raise OSError(
            f"{target} could not be written ({''.join(reason)}). Is the disk full? The checkpoint before it "
            "is sound"
        ) from error
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


def _innermost(error: BaseException) -> BaseException:
    """What went wrong on the first process that failed, out of what the library wraps it in."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
