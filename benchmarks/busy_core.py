"""What is left of the speed when another program takes a core: ours and llama.cpp, idle and busy in turns.

    python -m benchmarks.busy_core [--quick]

Barriers that wait for the slowest thread fall off a cliff here, at every operation. Writes
benchmarks/results/busy_core_<machine>_<yyyymm>.json.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from benchmarks import machine
from benchmarks.cpu_decode import RESULTS, converted_demo
from benchmarks.measure import alternate
from benchmarks.rivals import LlamaCpp, Process, Prosparse
from prosparse.engine.bench import sample_tokens
from prosparse.formats import open_model
from prosparse.model.tokenizer import Tokenizer


class Spinner:
    """A process that computes without pause, on whichever core it gets, but only inside `with running():`."""

    def __init__(self) -> None:
        self._process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        os.kill(self.pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        os.kill(self.pid, signal.SIGCONT)
        time.sleep(0.2)  # until the scheduler has placed it
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _spin() -> NoReturn:
    while True:
        pass


class Idle:
    """A system with the machine to itself."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    def tok_s(self, tokens: list[int]) -> float:
        """Mean over the run: with a core lost, single tokens are either fast or very slow."""
        return len(tokens) / sum(self._process.call("decode", tokens))


class Busy(Idle):
    """The same beside a spinner."""

    def __init__(self, process: Process, spinner: Spinner) -> None:
        super().__init__(process)
        self._spinner = spinner
        self.pid = spinner.pid  # so that its time does not count as noise

    def tok_s(self, tokens: list[int]) -> float:
        with self._spinner.running():
            return super().tok_s(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy_core", description=__doc__.split("\n")[0]
    )
    parser.add_argument("-m", "--model", type=Path, help="default: SmolLM2-135M at Q8_0")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-n", type=int, default=128, help="tokens decoded a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 short rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.n = 3, 64

    path = args.model or converted_demo("q8_0")
    model = open_model(path)
    tokens = sample_tokens(
        Tokenizer.build(model.tokenizer, model.config.bos_token_id, model.config.eos_token_ids), args.n
    )
    with contextlib.ExitStack() as stack:
        spinner = Spinner()
        stack.callback(spinner.close)
        ours = stack.enter_context(Process(Prosparse, path=path, n_threads=args.threads, mode="auto"))
        rival = stack.enter_context(Process(LlamaCpp, path=path, n_threads=args.threads))
        conditions: dict[str, Idle] = {}
        for name, process in (("prosparse", ours), ("llama.cpp", rival)):
            conditions |= {f"{name} idle": Idle(process), f"{name} busy": Busy(process, spinner)}
        turns = alternate(conditions, lambda condition: condition.tok_s(tokens), args.rounds)

    speeds = {name: statistics.median(turn.results) for name, turn in turns.items()}
    kept = {
        name: statistics.median(
            busy / idle
            for busy, idle in zip(turns[f"{name} busy"].results, turns[f"{name} idle"].results, strict=True)
        )
        for name in ("prosparse", "llama.cpp")
    }
    for name, share in kept.items():
        idle, busy = speeds[f"{name} idle"], speeds[f"{name} busy"]
        print(
            f"{name:<10} -t {args.threads}: {idle:.1f} tok/s idle, {busy:.1f} with one core busy, {share:.0%}"
        )
    result = {
        "machine": machine.describe(),
        "model": path.name,
        "threads": args.threads,
        "tok_s": speeds,
        "kept": kept,
        "noise": {name: turn.noise for name, turn in turns.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / f"busy_core_{machine.file_label()}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"kept": kept, "results": target.name}))


if __name__ == "__main__":
    main()
