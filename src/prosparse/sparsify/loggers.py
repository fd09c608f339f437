"""Where metrics may go besides metrics.jsonl: TensorBoard, trackio, Weights & Biases."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOGGERS = ("tensorboard", "trackio", "wandb")


def open_loggers(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any]
) -> list[Callable[[Mapping[str, Any]], None]]:
    """One function for each of `names`, to be given every step's metrics. ValueError for an unknown name or a
    package that is not installed."""
    loggers = []
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"unknown logger {name!r}: known are {', '.join(LOGGERS)}")
        try:
            loggers.append(
                _tensorboard(folder) if name == "tensorboard" else _tracker(name, folder, settings)
            )
        except ImportError:
            raise ValueError(f"--log {name} needs its package: pip install {name}") from None
    return loggers


def _tensorboard(folder: Path) -> Callable[[Mapping[str, Any]], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")

    def log(metrics: Mapping[str, Any]) -> None:
        for key, value in _numbers(metrics).items():
            writer.add_scalar(key, value, metrics["step"])
        writer.flush()

    return log


def _tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """trackio has the interface of wandb."""
    import importlib

    tracker = importlib.import_module(name)
    where = {"dir": str(folder)} if name == "wandb" else {}
    run = tracker.init(
        project="prosparse", name=folder.resolve().name, config=dict(settings), resume="allow", **where
    )

    def log(metrics: Mapping[str, Any]) -> None:
        run.log(_numbers(metrics), step=metrics["step"])

    return log


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if value is not None and key != "step"}
