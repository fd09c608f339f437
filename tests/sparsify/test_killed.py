"""kill -9 at random moments: the run that goes on gives what an unbroken one gives, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).with_name("killed.py")
KILLS = 20


def run(folder: Path, kills: int) -> int:
    folder.mkdir()
    command = [sys.executable, SCRIPT, folder, kills, 1]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout)


def lines(folder: Path) -> list[dict]:
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in metrics]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_at_random_moments(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run(unbroken, 0)
    assert run(broken, KILLS) >= KILLS // 2
    assert lines(broken) == lines(unbroken)
    want, got = (torch.load(folder / "weights.pt") for folder in (unbroken, broken))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not list((broken / "checkpoints").glob(".*"))
