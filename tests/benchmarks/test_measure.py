"""Turns alternate, noisy ones are repeated, ratios are taken within a round."""

import itertools
import os
from types import SimpleNamespace

import pytest
from benchmarks.rivals import LlamaCpp, Process, Prosparse
from benchmarks.shapes import tiny, write

from benchmarks import measure


def test_every_system_starts_a_round(monkeypatch):
    monkeypatch.setattr(measure, "_busy_seconds", lambda: 0.0)
    order = []
    workers = {name: SimpleNamespace(pid=os.getpid(), name=name) for name in "abc"}
    turns = measure.alternate(workers, lambda worker: order.append(worker.name), rounds=3)
    assert "".join(order) == "abcbcacab"
    assert [len(turn.results) for turn in turns.values()] == [3, 3, 3]


@pytest.fixture
def busy(monkeypatch):
    """Sets what the machine's busy seconds read before and after each run; a run takes one second."""
    clock = SimpleNamespace(sleep=lambda seconds: None, perf_counter=itertools.count().__next__)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "_own_seconds", lambda pids: 0.0)
    return lambda *seconds: monkeypatch.setattr(measure, "_busy_seconds", iter(seconds).__next__)


def test_noisy_turns_are_repeated(busy):
    busy(0.0, 0.2, 0.2, 0.5, 0.5, 0.5)
    runs = iter("abc")
    assert measure.quietly(lambda: next(runs), []) == ("c", 0.0)


def test_the_quietest_of_noisy_turns_is_kept(busy):
    busy(0.0, 0.5, 0.5, 0.75)
    runs = iter("ab")
    assert measure.quietly(lambda: next(runs), [], tries=2) == ("b", 0.25)


def test_statistics():
    assert measure.p10(range(1, 101)) == 11
    assert measure.median_ratio([2, 9, 4], [1, 3, 1]) == 3


def test_process_runs_measures_and_ends(tmp_path):
    write(tiny(), "q8_0", tmp_path / "m.gguf")
    arguments = {"path": tmp_path / "m.gguf", "n_threads": 1, "mode": "exact"}
    activation = {"hidden_act": "relu", "hidden_act_param": 0.0}
    with Process(Prosparse, **arguments, **activation) as process:
        assert len(process.call("decode", [3, 4, 5])) == 3
        assert process.call("prefill", [3, 4, 5]) > 0
        assert 0.4 < process.call("facts")["sparsity"] < 0.6
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_errors_come_back():
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf"):
        Process(Prosparse, path="nothing.gguf", n_threads=1, mode="dense")


def test_llama_cpp_runs_it(tmp_path):
    pytest.importorskip("llama_cpp", reason="the rival is installed by make bench")
    write(tiny(), "f16", tmp_path / "m.gguf")
    with Process(LlamaCpp, path=tmp_path / "m.gguf", n_threads=1) as process:
        assert len(process.call("decode", [3, 4, 5])) == 3
        assert process.call("prefill", [3, 4, 5]) > 0
