"""Loggers get every step's numbers, and say what is missing."""

import sys
from types import SimpleNamespace

import pytest

from prosparse.sparsify.loggers import open_loggers

METRICS = {"step": 3, "loss": 1.5, "wanted": None, "sparsity": 0.25}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers(monkeypatch, tmp_path, name):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)))
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, name, fake)
    (log,) = open_loggers([name], tmp_path / "my run", {"seed": 1})
    log(METRICS)
    options, logged = calls
    assert (options["project"], options["name"], options["config"]) == ("prosparse", "my run", {"seed": 1})
    assert logged == (3, {"loss": 1.5, "sparsity": 0.25})


def test_tensorboard(tmp_path):
    pytest.importorskip("torch")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (log,) = open_loggers(["tensorboard"], tmp_path, {})
    log(METRICS)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["loss", "sparsity"]
    assert [(e.step, e.value) for e in found.Scalars("sparsity")] == [(3, 0.25)]


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        open_loggers(["wandb"], tmp_path, {})
    with pytest.raises(ValueError, match="known are tensorboard, trackio, wandb"):
        open_loggers(["paper"], tmp_path, {})
