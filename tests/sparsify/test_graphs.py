"""What is recorded as a CUDA graph does what the function did."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from worker import trainer  # noqa: E402

from prosparse.sparsify.graphs import Replayed  # noqa: E402
from prosparse.sparsify.trainer import Trainer  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("micro", [2, 4])
def test_a_run_learns_what_it_does_without(tmp_path, monkeypatch, micro, optimizer):
    """The same numbers step by step, checkpoints included: the second half is another trainer's."""
    losses = {}
    for graphs in (True, False):
        if not graphs:
            monkeypatch.setattr(Trainer, "_can_be_recorded", lambda self: False)
        folder = tmp_path / str(graphs)
        options = {"optimizer": optimizer, "device": "cuda", "compile": True, "checkpoint_every": 10}
        for steps in (10, 20):
            run = trainer(folder, micro, steps=steps, **options)
            assert (run._graphs is not None) == graphs
            run.run()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 20
        losses[graphs] = [(line["loss"], line["sparsity"]) for line in lines]
    assert losses[True] == [pytest.approx(values, abs=2e-3) for values in losses[False]]
