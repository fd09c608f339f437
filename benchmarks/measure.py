"""Fair timing on a machine that is never quite quiet.

Systems run in turns, round by round, so that all see the same minute of the machine; a turn during which
other processes used more than a tenth of a core is done again; ratios are taken within a round, then their
median.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

NOISE_LIMIT = 0.10  # of one core
SETTLE = 0.05  # seconds for a rival's spinning threads to go to sleep before the next turn
TICKS = os.sysconf("SC_CLK_TCK")


T = TypeVar("T")
W = TypeVar("W", bound="Worker")


class Worker(Protocol):
    """Something measured; runs in the process `pid`."""

    @property
    def pid(self) -> int: ...


@dataclass(slots=True)
class Turns(Generic[T]):
    """Results of one system, one entry a round, and the highest share of a core others used meanwhile."""

    results: list[T] = field(default_factory=list)
    noise: float = 0.0


def alternate(workers: Mapping[str, W], work: Callable[[W], T], rounds: int) -> dict[str, Turns[T]]:
    """`work` on every worker in turn, `rounds` times; the starting worker changes each round."""
    turns: dict[str, Turns[T]] = {name: Turns() for name in workers}
    names = list(workers)
    pids = {os.getpid(), *(worker.pid for worker in workers.values())}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            result, noise = quietly(functools.partial(work, workers[name]), pids)
            turns[name].results.append(result)
            turns[name].noise = max(turns[name].noise, noise)
    return turns


def quietly(work: Callable[[], T], pids: Iterable[int], tries: int = 4) -> tuple[T, float]:
    """Result of the quietest of up to `tries` runs, ending at the first quiet one, and its noise."""
    pids = list(pids)
    best: tuple[T, float] | None = None
    for _ in range(tries):
        time.sleep(SETTLE)
        start, others = time.perf_counter(), _busy_seconds() - _own_seconds(pids)
        result = work()
        others = _busy_seconds() - _own_seconds(pids) - others
        noise = max(0.0, others / (time.perf_counter() - start))
        if best is None or noise < best[1]:
            best = result, noise
        if noise <= NOISE_LIMIT:
            break
    assert best is not None
    return best


def _busy_seconds() -> float:
    """CPU seconds the machine has spent so far, stolen ones included."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def _own_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of these processes so far, all threads, and of the programs that they ran."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))  # utime, stime, and those of children that have ended
    return total / TICKS


def p10(values: Iterable[float]) -> float:
    """The value a tenth of the sample lies below: a best case that one lucky sample cannot set."""
    ordered = sorted(values)
    return ordered[len(ordered) // 10]


def median_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
