"""The benchmarks, by name: the folder of a benchmark has its name too."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prosparse.evaluate.tasks import boolq, copa, hellaswag, lambada, piqa, siqa, winogrande
from prosparse.evaluate.tasks.reading import Item

Metric = Literal["acc", "acc_norm"]
WIKITEXT2 = "wikitext2"  # a text, not items: `wikitext2.load`


@dataclass(frozen=True, slots=True)
class Task:
    """`load(folder)` gives the items; `headline` is the metric that is reported for the benchmark."""

    load: Callable[[Path], list[Item]]
    headline: Metric = "acc"


TASKS: dict[str, Task] = {
    "piqa": Task(piqa.load, "acc_norm"),
    "siqa": Task(siqa.load),
    "hellaswag": Task(hellaswag.load, "acc_norm"),
    "winogrande": Task(winogrande.load),
    "copa": Task(copa.load),
    "boolq": Task(boolq.load),
    "lambada": Task(lambada.load),
}
NAMES = (*TASKS, WIKITEXT2)
