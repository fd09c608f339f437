"""Recipes run from beginning to end as they are documented."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

RECIPES = Path(__file__).parents[1] / "recipes"


def test_tiny_cpu_meets_its_goal(tmp_path):
    """Sparsity, quality beside the control, one answer from torch, engine and GGUF; three minutes."""
    out = tmp_path / "run"
    command = [sys.executable, RECIPES / "tiny_cpu.py", "--out", out, "--json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["sparsity"] >= 0.85
    assert result["ratio"] == pytest.approx(result["loss"] / result["control_loss"])
    assert result["ratio"] <= 1.03
    # training goes on in both: a control that learnt nothing would be no control
    assert result["control_loss"] < result["dense_loss"]
    assert result["gguf_is_folder"] and result["torch_prefers_by"] <= 0.5
    assert result["compared_tokens"] >= 32
    assert result["text"].strip() and result["text_sparsity"] >= 0.85
    assert (out / "tiny-q8_0.gguf").is_file()


def test_tiny_cpu_leaves_a_folder_alone(tmp_path):
    command = [sys.executable, RECIPES / "tiny_cpu.py", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "exists" in run.stderr
    assert not list(tmp_path.iterdir())
