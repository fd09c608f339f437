"""Training checkpoints: folders that appear whole or not at all, newest kept."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{8})")


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes `state` as step `step` of `folder`, and removes all but the `keep` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    part = folder / f".{target.name}.{os.getpid()}"
    part.mkdir()
    try:
        with (part / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_latest(folder: Path, device: torch.device | str = "cpu") -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint, or None. Half-written ones are cleared away."""
    for part in folder.glob(".step-*"):
        shutil.rmtree(part)
    found = _all(folder)
    if not found:
        return None
    state = torch.load(found[-1] / "state.pt", map_location=device, weights_only=True)
    return int(found[-1].name.removeprefix("step-")), state


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
