"""What an evaluation has found so far, on disk after each benchmark, and as a table."""

import json
import math
from pathlib import Path
from typing import Any

from prosparse import __version__
from prosparse.evaluate.tasks import NAMES, TASKS
from prosparse.formats.files import written_whole


class Results:
    """Results by benchmark, under `settings` that change them. With a `path` they are written there whenever
    one is added, and those of an earlier run are read first.

    ValueError for a file that holds something else, or results under other settings.
    """

    def __init__(self, settings: dict[str, Any], path: Path | None = None) -> None:
        self.settings = settings
        self.tasks: dict[str, dict[str, Any]] = {}
        self._path = path
        if path is not None and path.exists():
            self.tasks = self._read(path)

    def add(self, task: str, values: dict[str, Any]) -> None:
        """`values`: what JSON can hold; `metric` and `value`, the headline number, are among them."""
        self.tasks[task] = values
        if self._path is not None:
            with written_whole(self._path) as file:
                file.write(json.dumps(self.to_json(), indent=1, allow_nan=False).encode() + b"\n")

    @property
    def mean(self) -> tuple[float, float] | None:
        """Of the seven headline accuracies, with its standard error; None until all are there."""
        found = [self.tasks[name] for name in TASKS if name in self.tasks]
        if len(found) < len(TASKS):
            return None
        errors = [task[f"{task['metric']}_stderr"] for task in found]
        return math.fsum(task["value"] for task in found) / len(found), math.hypot(*errors) / len(found)

    def to_json(self) -> dict[str, Any]:
        """`mean` and `mean_stderr` are there only once all seven benchmarks are."""
        found: dict[str, Any] = {"prosparse": __version__, "settings": self.settings, "tasks": self.tasks}
        if self.mean is not None:
            found["mean"], found["mean_stderr"] = self.mean
        return found

    def table(self) -> str:
        """One line a benchmark; accuracies in per cent."""
        lines = [f"{'task':<12}{'metric':<10}{'value':>14}{'acc':>8}{'acc_norm':>10}{'n':>7}{'sparsity':>10}"]
        for name in (name for name in NAMES if name in self.tasks):
            task = self.tasks[name]
            if name in TASKS:
                value = _percent(task["value"], task[f"{task['metric']}_stderr"])
                acc = f"{task['acc']:.2%}"
                norm = f"{task['acc_norm']:.2%}" if "acc_norm" in task else "-"
            else:
                value, acc, norm = f"{task['value']:.3f} ± {task['ppl_stderr']:.3f}", "-", "-"
            row = f"{name:<12}{task['metric']:<10}{value:>14}{acc:>8}{norm:>10}{task['n']:>7}"
            lines.append(f"{row}{task['sparsity']:>10.1%}")
            if task.get("cut"):
                lines.append(f"  {task['cut']} requests of {name} were cut on the left to fit the context")
        if self.mean is not None:
            lines.append(f"{'mean':<12}{'headline':<10}{_percent(*self.mean):>14}")
        return "\n".join(lines)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(path.read_bytes())
            settings: dict[str, Any] = found["settings"]
            tasks: dict[str, dict[str, Any]] = found["tasks"]
            different = [
                f"{name} was {settings.get(name)!r} and is {self.settings.get(name)!r}"
                for name in {**self.settings, **settings}
                if settings.get(name) != self.settings.get(name)
            ]
            sound = all({"metric", "value", "n", "sparsity"} <= task.keys() for task in tasks.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            sound, different = False, []
        if not sound:
            raise ValueError(f"{path} holds no results of prosparse eval: give --out another name")
        if different:
            raise ValueError(
                f"{path} holds results of another run ({'; '.join(different)}): "
                "give --out another name, or delete it"
            )
        return tasks


def _percent(value: float, stderr: float) -> str:
    return f"{100 * value:.2f} ± {100 * stderr:.2f}"
