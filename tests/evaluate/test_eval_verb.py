"""`prosparse eval`: both runners, the results file, and going on after an interruption."""

import json
import subprocess
import sys

import pytest
from benchmarks_data import TEXT, put, write

from prosparse import cli
from prosparse.evaluate import scoring
from prosparse.evaluate.results import Results
from prosparse.evaluate.tasks import NAMES, TASKS

pytest.importorskip("prosparse._core")


@pytest.fixture
def evaluate(tiny_model, monkeypatch, tmp_path, capsys):
    """`evaluate(*args)`: (exit code, stdout, stderr) on benchmarks of a few items."""
    models = {"relu": tiny_model(seed=3, act="relu"), "other": tiny_model(seed=4)}
    monkeypatch.setattr("prosparse.formats.open_model", lambda path: models[path])
    write(tmp_path / "data")

    def run(*args: object, model: str = "relu") -> tuple[int, str, str]:
        command = ["eval", "-m", model, "--data-dir", tmp_path / "data", "-c", "32", *args]
        code = cli.main([str(arg) for arg in command])
        return code, *capsys.readouterr()

    return run


def test_the_engine(evaluate):
    code, out, err = evaluate("--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    tasks = found["tasks"]
    assert tuple(tasks) == NAMES
    for name, task in TASKS.items():
        assert tasks[name]["metric"] == task.headline
        assert tasks[name]["value"] == tasks[name][task.headline]
        assert ("ppl" in tasks[name]) == (name == "lambada") != ("acc_norm" in tasks[name])
    assert found["mean"] == pytest.approx(sum(tasks[name]["value"] for name in TASKS) / 7)
    assert tasks["wikitext2"]["ctx"] == 32 and tasks["wikitext2"]["n"] % 15 == 0
    assert all(0.2 < task["sparsity"] < 0.8 and task["seconds"] >= 0 for task in tasks.values())
    assert all(name in out for name in (*NAMES, "mean"))
    assert "engine, exact mode" in err


def test_torch_agrees(evaluate):
    pytest.importorskip("transformers")
    (_, engine, _), (code, out, err) = evaluate("--json"), evaluate("--json", "--device", "cpu", "-t", "2")
    assert code == 0 and "torch, cpu, float32" in err
    engine, torch = (json.loads(text.splitlines()[-1])["tasks"] for text in (engine, out))
    for name in NAMES:
        assert torch[name]["value"] == pytest.approx(engine[name]["value"], rel=0.01), name
        assert torch[name]["sparsity"] == pytest.approx(engine[name]["sparsity"], abs=0.05)


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom prosparse.cli import main\ntry: main(['eval', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_limit_and_tasks(evaluate):
    _, out, _ = evaluate("--tasks", "piqa, wikitext2,piqa", "--limit", 1, "--json")
    found = json.loads(out.splitlines()[-1])
    assert list(found["tasks"]) == ["piqa", "wikitext2"] and "mean" not in found
    assert found["tasks"]["piqa"]["n"] == 1 and found["tasks"]["wikitext2"]["n"] == 15


def test_an_interrupted_run_goes_on(evaluate, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    whole = evaluate("--json")[1].splitlines()[-1]
    real, calls = scoring.evaluate, []

    def third_is_interrupted(items, *rest):
        calls.append(items)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(items, *rest)

    monkeypatch.setattr(scoring, "evaluate", third_is_interrupted)
    assert evaluate("--out", out)[0] == cli.INTERRUPTED
    assert list(json.loads(out.read_text())["tasks"]) == ["piqa", "siqa"]
    code, text, _ = evaluate("--out", out, "--json")
    assert code == 0 and len(calls) == 3 + 5
    found = json.loads(text.splitlines()[-1])
    assert json.loads(out.read_text()) == found
    whole = json.loads(whole)
    for results in found, whole:
        for task in results["tasks"].values():
            del task["seconds"]
    assert found == whole
    # and nothing is measured, not even loaded, a second time
    monkeypatch.setattr("prosparse.evaluate.runners.load", lambda *_: pytest.fail("loaded"))
    assert evaluate("--out", out, "--tasks", "copa")[0] == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": ("--limit", 2)}, "limit was 1 and is 2"),
        ({"args": ("--limit", 1, "--device", "cpu")}, "runner was 'engine' and is 'torch cpu'"),
        ({"args": ("--limit", 1, "--mode", "dense")}, "mode was"),
        ({"args": ("--limit", 1, "--hidden-act", "silu")}, "weights was"),
        ({"args": ("--limit", 1), "model": "other"}, "weights was"),
    ],
)
def test_other_settings_are_refused(evaluate, tmp_path, options, message):
    out = tmp_path / "results.json"
    assert evaluate("--tasks", "copa", "--limit", 1, "--out", out)[0] == 0
    before = out.read_bytes()
    code, _, err = evaluate(
        "--tasks", "copa", "--out", out, *options["args"], model=options.get("model", "relu")
    )
    assert code == cli.USER_ERROR and message in err and "another name" in err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"settings": {}, "tasks": {"piqa": {}}}', '{"settings": 1, "tasks": 2}'],
)
def test_files_of_something_else_are_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="no results of prosparse eval"):
        Results({}, tmp_path / "x.json")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tasks", "piqa,mmlu"), "'mmlu'"),
        (("--limit", 0), "--limit"),
        (("-c", 3), "-c must"),
        (("-c", 4096), "holds 512"),
        (("--device", "cpu", "--mode", "dense"), "--mode"),
        (("--device", "cpu", "--recall", 0.9), "--recall"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--device", "cpu", "-t", 0), "threads"),
    ],
)
def test_bad_options(evaluate, args, message):
    pytest.importorskip("transformers")
    code, _, err = evaluate(*args)
    assert code == cli.USER_ERROR and message in err


def test_damaged_data_is_found_before_anything_is_measured(evaluate, tmp_path, monkeypatch):
    put(tmp_path / "data", TEXT, b"\xff")
    monkeypatch.setattr("prosparse.evaluate.runners.open_model", lambda _: pytest.fail("opened"))
    code, _, err = evaluate()
    assert code == cli.USER_ERROR and "line 1: not UTF-8" in err
