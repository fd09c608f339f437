"""What is seen of a run while it trains, and its curves afterwards."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prosparse.model.config import ModelConfig
from prosparse.sparsify.speed import peak_flops, training_flops
from prosparse.sparsify.trainer import Trainer

_QUIET_SECONDS = 30.0  # between lines where there is no terminal to draw a bar on


def train(
    trainer: Trainer,
    model: ModelConfig,
    loggers: Sequence[Callable[[Mapping[str, Any]], None]],
    *,
    lora: bool = False,
) -> dict[str, Any]:
    """Runs all steps that are left with a progress line; every step's metrics go to `loggers`. It returns the
    last step's."""
    console = Console(stderr=True, quiet=not trainer.world.is_main)
    speed = _Speed(trainer, model, lora)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    steps, said = trainer.config.steps, 0.0
    last: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as bar:
        task = bar.add_task("training", total=steps, completed=trainer.step)

        def show(metrics: dict[str, Any]) -> None:
            nonlocal last, said
            last = metrics
            text = describe(trainer, metrics, speed)
            bar.update(task, completed=metrics["step"], description=text)
            now = time.monotonic()
            if not console.is_terminal and (now - said > _QUIET_SECONDS or metrics["step"] == steps):
                said = now
                console.print(f"step {metrics['step']}/{steps}  {text}", highlight=False, soft_wrap=True)
            for log in loggers:
                log(metrics)

        trainer.run(show)
    if not last:  # everything was done before
        lines = (trainer.folder / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
    return last


def describe(trainer: Trainer, metrics: Mapping[str, Any], speed: "_Speed") -> str:
    """One step in a line: stage, lambda or wanted sparsity, sparsity, losses, speed."""
    schedule = trainer.config.schedule
    if schedule:
        way = f"{schedule.stage_at(metrics['step']).name} λ {metrics['lambda']:.2g}"
    elif metrics["wanted"] is not None:
        way = f"wanted {metrics['wanted']:.1%}"
    else:
        way = "ReLU" if trainer.config.control else "dense"
    losses = f"loss {metrics['loss']:.3f} next {metrics['next_token']:.3f} KL {metrics['kl']:.3f}"
    skipped = " SKIPPED: not finite" if metrics.get("skipped") else ""
    return f"{way} · sparsity {metrics['sparsity']:.1%} · {losses} · {speed.of(metrics)}{skipped}"


class _Speed:
    """Tokens a second of all processes, and the share of their peak that is."""

    def __init__(self, trainer: Trainer, model: ModelConfig, lora: bool) -> None:
        context = trainer.feeds[0].mixture.context
        distil = trainer.config.mix.taught
        self._flops = training_flops(model, context, distil=distil, lora=lora)
        self._peak = None
        if trainer.device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(trainer.device))):
            self._peak = peak * trainer.world.size
        self._before = trainer.tokens_until(trainer.step)

    def of(self, metrics: Mapping[str, Any]) -> str:
        tokens, self._before = metrics["tokens"] - self._before, metrics["tokens"]
        rate = tokens / metrics["seconds"]
        return f"{rate:,.0f} tok/s" + (f" MFU {rate * self._flops / self._peak:.0%}" if self._peak else "")


def plot(folder: Path) -> None:
    """The curves of a run, where matplotlib is installed."""
    from prosparse.sparsify.plot import plot

    try:
        plot(folder / "metrics.jsonl", folder / "metrics.png")
    except ImportError:
        print("no curves: install matplotlib for metrics.png")
