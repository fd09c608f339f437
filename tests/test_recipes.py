"""Recipes run from beginning to end as they are documented."""

import argparse
import importlib.util
import json
import statistics
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


@pytest.fixture
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2_135m", RECIPES / "smollm2_135m.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_legs_are_runs_of_sparsify(smollm2):
    """Their options are known, and each starts with what an earlier one leaves."""
    from prosparse.sparsify import run

    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    before: set[str | None] = {None}
    for name, leg in smollm2.LEGS.items():
        args = parser.parse_args(leg.options.split())
        # adapters leave them alone
        assert args.keep_embeddings or args.levels or leg.size, name
        assert leg.after in before
        before.add(name)


def test_the_table_comes_from_saved_results(smollm2):
    text = smollm2.table(smollm2.RESULTS)
    losses, benchmarks = (part.splitlines() for part in text.split("\n\n"))
    names = [name for name in smollm2.LEGS if name != "trunk"]  # that one was stopped: nothing was saved
    reports = {name: smollm2.RESULTS / name / "report.json" for name in names}
    rows = {
        name: {Path(row["source"]).name: row for row in json.loads(path.read_text())["rows"]}
        for name, path in reports.items()
    }
    assert losses[0] == "| held-out text | original | " + " | ".join(names) + " |"
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[2:] for line in losses[2:]}
    openstax = rows["90"]["openstax"]
    gap = openstax["sparse"] - openstax["original"]
    assert cells["openstax"][names.index("90")].startswith(f"{gap:+.3f}")
    # legs were measured on samples of their own; the last line compares what all of them read
    own = cells["its own text, seed 6"]
    assert own[names.index("second")] == "-" != own[names.index("90")]
    shared = [row for name, row in rows["90"].items() if "its own text" not in name]
    total = sum(row["tokens"] * (row["sparse"] - row["original"]) for row in shared)
    mean = total / sum(row["tokens"] for row in shared)
    assert len(shared) == 8
    assert cells["all but its own"][names.index("90")].startswith(f"{mean:+.3f}")
    lines = {line.split(" | ")[0].strip("| "): line for line in benchmarks[2:]}
    assert list(lines) == ["original", *names[names.index("second") :]]
    tasks = json.loads((smollm2.RESULTS / "90" / "eval.json").read_text())["tasks"]
    assert f"{100 * tasks['lambada']['value']:.2f}" in lines["90"]
    mean = statistics.mean(task["value"] for name, task in tasks.items() if name != "wikitext2")
    assert lines["90"].endswith(f"| {100 * mean:.2f} |")


def test_kept_results_name_no_place_of_a_machine(smollm2):
    for path in smollm2.RESULTS.parent.rglob("*.json"):
        assert '"/' not in path.read_text(), path
