"""What is recorded as a CUDA graph does what the function did."""

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from worker import trainer  # noqa: E402

from prosparse.sparsify import lessons  # noqa: E402
from prosparse.sparsify.config import TrainConfig  # noqa: E402
from prosparse.sparsify.distributed import World  # noqa: E402
from prosparse.sparsify.gpu import Replayed  # noqa: E402
from prosparse.sparsify.losses import LossMix  # noqa: E402
from prosparse.sparsify.schedule import LearningRate  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Imitated(Replayed):
    """On a CPU, with what makes graphs treacherous: inputs are copied, the result is overwritten."""

    def __call__(self, *inputs):
        if not self._inputs:
            self._inputs = tuple(tensor.clone() for tensor in inputs)
            self._output = self._function(*self._inputs)
            self._undo()
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        result = self._function(*self._inputs).detach()
        return self._output.detach().copy_(result)


@needs_gpu
def test_a_function_is_recorded_once():
    weight = torch.ones(3, device="cuda")
    total = torch.zeros(3, device="cuda")
    calls = []

    def function(x, y):
        calls.append(1)
        total.add_(x)
        return weight * x + y

    replayed = Replayed(function, total.zero_)
    for i in range(3):
        x, y = torch.full((3,), i + 1.0, device="cuda"), torch.arange(3.0, device="cuda")
        assert torch.equal(replayed(x, y), weight * x + y)
        weight += 1
    assert torch.equal(total, torch.full((3,), 6.0, device="cuda"))
    assert len(calls) == 4  # to warm up, and to record


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("micro", [2, 4])
def test_a_run_learns_what_it_does_without(tmp_path, monkeypatch, micro, optimizer, device):
    """The same numbers step by step, checkpoints included: the second half is another trainer's."""
    if device == "cpu":
        monkeypatch.setattr(lessons, "Replayed", Imitated)
    losses = {}
    for recorded in (True, False):
        monkeypatch.setattr(lessons, "_can_be_recorded", lambda *_, recorded=recorded: recorded)
        folder = tmp_path / str(recorded)
        options = {"optimizer": optimizer, "device": device, "compile": device == "cuda"}
        for steps in (10, 20):
            trainer(folder, micro, steps=steps, checkpoint_every=10, **options).run()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 20
        losses[recorded] = [(line["loss"], line["sparsity"], line["grad_norm"]) for line in lines]
    within = 1e-5 if device == "cpu" else 2e-3
    assert losses[True] == [pytest.approx(values, abs=within) for values in losses[False]]


@pytest.mark.parametrize(
    ("changes", "device", "possible"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"compile": False}, "cuda", False),
        ({"document_mask": True}, "cuda", False),
        ({"recompute": True}, "cuda", False),
        ({"mix": LossMix(states=1.0)}, "cuda", False),
        ({"mix": LossMix(next_token=1.0, distil=0.0)}, "cuda", False),
    ],
)
def test_what_can_be_recorded(changes, device, possible):
    config = TrainConfig(1, 1, LearningRate("constant", 1e-3, 1), compile=True)
    found = lessons._can_be_recorded(replace(config, **changes), World(), torch.device(device))
    assert found == possible
    assert not lessons._can_be_recorded(config, World(0, 2, sharded=True), torch.device("cuda"))
