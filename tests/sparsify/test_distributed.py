"""Two processes train what one does; what they leave, one goes on from; adapters export merged."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prosparse.formats import open_model
from prosparse.formats.hf import write_folder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

WORKER = Path(__file__).with_name("worker.py")


def launch(
    folder: Path,
    processes: int,
    *,
    stop: int = 0,
    micro: int = 1,
    rank: int = 0,
    optimizer: str = "adamw",
    shard: bool = False,
) -> None:
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    many = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [
        sys.executable,
        *(many if processes else []),
        WORKER,
        folder,
        stop,
        micro,
        rank,
        optimizer,
        shard,
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def column(folder: Path, name: str) -> np.ndarray:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line[name] for line in lines], float)


@pytest.mark.parametrize(("rank", "shard"), [(0, False), (0, True), (4, True)])
def test_two_processes_equal_one(tmp_path, rank, shard):
    one, two = tmp_path / "one", tmp_path / "two"
    launch(one, 0, rank=rank)
    launch(two, 2, rank=rank, shard=shard)
    assert len(column(one, "loss")) == 20
    for name, tolerance in [("loss", 1e-4), ("kl", 1e-4), ("sparsity", 2e-3), ("grad_norm", 1e-3)]:
        np.testing.assert_allclose(column(two, name), column(one, name), atol=tolerance, err_msg=name)
    weights = [torch.load(folder / "weights.pt") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert not any("lora" in name or "base_layer" in name for name in weights[0])
    for name, values in weights[0].items():
        torch.testing.assert_close(weights[1][name], values, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shard", ["", " --shard"])
def test_the_verb_on_two_processes(tmp_path, tiny_model, shard):
    """Text the original writes, a control that it teaches too, a report, and a model that opens."""
    write_folder(tmp_path / "tiny", tiny_model(intermediate=256), "F32")
    row = json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 5}) + "\n"
    (tmp_path / "data.jsonl").write_text(row * 60)
    options = (
        "sparsify -m tiny --data data.jsonl --out out --context 32 --batch-tokens 128 --tokens 1280 --micro 2"
    )
    options += " --device cpu --workers 1 --next-token 0.5 --control --self-data 4000 --json" + shard
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "prosparse", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["report"]["rows"]) == 2
    assert all(row["control"] for row in result["report"]["rows"])
    assert open_model(tmp_path / "out" / "model").config.activation.name == "fatrelu"


# Muon's products are bfloat16: what rounding changes grows
@pytest.mark.parametrize(
    ("optimizer", "shard", "tolerance"),
    [("adamw", False, 1e-4), ("adamw", True, 1e-4), ("muon", False, 3e-3), ("muon", True, 3e-3)],
)
def test_one_process_goes_on_from_two(tmp_path, optimizer, shard, tolerance):
    one, two = tmp_path / "one", tmp_path / "two"
    launch(one, 0, optimizer=optimizer)
    launch(two, 2, stop=12, optimizer=optimizer, shard=shard)
    assert len(column(two, "loss")) == 12
    launch(two, 0, optimizer=optimizer)
    np.testing.assert_allclose(column(two, "loss"), column(one, "loss"), atol=tolerance)
