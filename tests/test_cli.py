"""The command line: verbs on a tiny model in process, and what only a real process shows."""

import argparse
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import prosparse
from prosparse import cli, options
from prosparse.engine.engine import LLM
from prosparse.engine.sampler import SamplingParams

COMMAND = [sys.executable, "-m", "prosparse"]


@pytest.fixture
def tiny_cli(tiny_model, monkeypatch):
    """`run(*args)` runs a command line on a tiny model with the numpy engine."""
    models = {"dense": tiny_model(seed=3), "sparse": tiny_model(seed=3, act="relu")}
    monkeypatch.setattr("prosparse.formats.open_model", lambda path: models[path])
    monkeypatch.setattr("prosparse.load", functools.partial(prosparse.load, backend="naive"))
    return lambda *args: cli.main([str(arg) for arg in args])


def json_line(captured: str) -> dict:
    return json.loads(captured.splitlines()[-1])


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"], ["run", "--help"], ["chat", "--help"]])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\nfrom prosparse.cli import main\n"
        f"try: main({args})\nexcept SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'rich', 'transformers', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "prosparse" in run.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_and_json(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and "--debug" in text


def test_import_is_light():
    code = "import prosparse, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_a_model_does_not_import_torch(smollm2_path):
    pytest.importorskip("prosparse._core")
    code = f"import prosparse, sys; prosparse.load({str(smollm2_path)!r}).generate('Hi', max_tokens=1)\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["version"] == prosparse.__version__


def test_sampling_flags_have_the_sampler_s_defaults():
    parser = argparse.ArgumentParser()
    options.add_sampling(parser)
    assert options.sampling(parser.parse_args([])) == SamplingParams()


def test_run(tiny_cli, capsys):
    assert tiny_cli("run", "-m", "sparse", "-p", "hello", "-n", 6, "--temp", 0, "--json") == 0
    out, err = capsys.readouterr()
    result = json_line(out)
    assert list(result) == [
        "text",
        "n_prompt",
        "n_gen",
        "prompt_tok_s",
        "gen_tok_s",
        "sparsity",
        "mode",
        "finish_reason",
        "bytes_per_token",
    ]
    assert (result["n_prompt"], result["n_gen"], result["mode"]) == (6, 6, "exact")
    assert out.startswith(result["text"] + "\n{")
    assert "tok/s" in err and "relu" in err


def test_run_reads_stdin_and_files(tiny_cli, capsys, monkeypatch, tmp_path):
    text = "日本 hello"
    (tmp_path / "prompt.txt").write_bytes(text.encode() + b"\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode() + b"\n")))
    results = []
    for source in (["-p", text], ["-p", "-"], ["-f", tmp_path / "prompt.txt"]):
        assert tiny_cli("run", "-m", "dense", *source, "-n", 4, "--temp", 0, "--json") == 0
        results.append(json_line(capsys.readouterr().out))
    assert [r["text"] for r in results] == [results[0]["text"]] * 3
    assert results[0]["n_prompt"] == 1 + len(text.encode())


def test_run_applies_the_chat_template_unless_raw(tiny_cli, capsys, monkeypatch):
    monkeypatch.setattr(LLM, "chat_template", "{{ messages | map(attribute='content') | join('|') }}")
    assert tiny_cli("run", "-m", "dense", "-p", "hi", "--system", "be", "-n", 1, "--json") == 0
    assert json_line(capsys.readouterr().out)["n_prompt"] == len("<be|hi")
    assert tiny_cli("run", "-m", "dense", "-p", "hi", "--raw", "-n", 1, "--json") == 0
    assert json_line(capsys.readouterr().out)["n_prompt"] == len("<hi")
    assert tiny_cli("run", "-m", "dense", "-p", "hi", "--raw", "--system", "be") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "x" * 600], r"601 tokens"),
        (["-p", "hi", "-c", "9999"], "9999"),
        (["-p", "hi", "--temp", "-1"], "temperature"),
        (["-p", "hi", "--stop", ""], "stop"),
        (["-p", "hi", "--mode", "exact"], "silu"),
        (["-p", "hi", "--mode", "quick"], "quick"),
        (["-p", "hi", "--hidden-act", "mish"], "mish"),
        (["-p", "hi", "-t", "0"], "threads"),
        (["-f", "/no/such/file"], "/no/such/file"),
    ],
)
def test_mistakes_are_one_line(tiny_cli, capsys, args, message):
    assert tiny_cli("run", "-m", "dense", *args) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prosparse run: error: ") and err.count("\n") == 1
    assert message in err


def test_debug_shows_the_traceback(tiny_cli):
    with pytest.raises(ValueError, match="temperature"):
        tiny_cli("run", "-m", "dense", "-p", "hi", "--temp", "-1", "--debug")


def test_missing_model_and_verb(capsys):
    assert cli.main(["run", "-m", "/no/such.gguf", "-p", "hi"]) == 2
    assert "/no/such.gguf" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["fly"])
    assert end.value.code == 2
    assert "fly" in capsys.readouterr().err


def test_chat(tiny_cli, capsys, monkeypatch):
    lines = "hello\n\n/help\n/stats\nagain\n/clear\nhello\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert tiny_cli("chat", "-m", "dense", "-n", 5, "--temp", 0, "--system", "be", "--json") == 0
    out, err = capsys.readouterr()
    result = json_line(out)
    first, second, third = result["answers"]
    assert first["text"] == third["text"] and second["n_prompt"] > first["n_prompt"]
    assert [m["role"] for m in result["messages"]] == ["system", "user", "assistant"]
    assert "/clear" in err and "tok/s" in err


def test_chat_interrupted_answer_is_dropped(tiny_cli, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n"))
    answer, interrupted = LLM.chat, []

    def chat(self, messages, **kw):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return answer(self, messages, **kw)

    monkeypatch.setattr(LLM, "chat", chat)
    assert tiny_cli("chat", "-m", "dense", "-n", 5, "--json") == 0
    assert [m["role"] for m in json_line(capsys.readouterr().out)["messages"]] == ["user", "assistant"]


def test_chat_too_long(tiny_cli, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 600 + "\n"))
    assert tiny_cli("chat", "-m", "dense") == 2
    assert "tokens" in capsys.readouterr().err


def test_demo(tiny_cli, capsys):
    assert tiny_cli("demo", "-m", "dense", "-n", 5, "--json") == 0
    out, _ = capsys.readouterr()
    result = json_line(out)
    assert result["mode"] == "dense" and "modes" not in result
    assert result["bytes"]["FFN gate"] == 2 * 96 * 160 * 4
    assert "FFN gate" in out and "attention" in out


def test_demo_compares_a_sparse_model_with_its_dense_twin(tiny_cli, capsys):
    assert tiny_cli("demo", "-m", "sparse", "-n", 5, "-r", 2, "--json") == 0
    out, _ = capsys.readouterr()
    modes = json_line(out)["modes"]
    assert set(modes) == {"dense", "exact"}
    assert modes["exact"]["bytes_per_token"] < modes["dense"]["bytes_per_token"]
    assert modes["exact"]["sparsity"] == pytest.approx(modes["dense"]["sparsity"])
    assert "Same text from both: all 5 tokens." in out


def test_keyboard_interrupt(monkeypatch, capsys):
    module = importlib.import_module(cli.VERBS["run"][0])

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "main", interrupt)
    assert cli.main(["run", "-m", "x", "-p", "y"]) == 130
    assert capsys.readouterr() == ("\n", "")


def test_interrupt_of_a_real_run(smollm2_path):
    pytest.importorskip("prosparse._core")
    # goes on until the context is full, so that it cannot end before the signal comes
    prompt = ["--raw", "-p", "1 2 3 4 5 6 7 8", "--temp", "0", "-n", "-1"]
    command = [*COMMAND, "run", "-m", str(smollm2_path), *prompt]

    def heed_interrupts() -> None:
        # a shell that runs these tests in the background has its children ignore them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, preexec_fn=heed_interrupts, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)  # it answers
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - start < 10
    assert out.endswith(b"\n") and b"Traceback" not in err


def test_broken_pipe(smollm2_path):
    pytest.importorskip("prosparse._core")
    command = [*COMMAND, "run", "-m", str(smollm2_path), "-p", "Hello", "-n", "200", "--temp", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        code = process.wait(timeout=60)
    assert code == cli.BROKEN_PIPE
    assert err == b""
