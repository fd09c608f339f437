"""The verb, from text to files."""

import json
import subprocess
import sys

import numpy as np
import pytest

from prosparse import cli
from prosparse.formats import open_model
from prosparse.formats.hf import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("verb")
    for act in ("silu", "fatrelu_0.5"):
        write_folder(root / act, tiny_model(act=act), "F32")
    rng = np.random.default_rng(0)
    rows = [json.dumps({"text": "".join(rng.choice(list("abcdefgh "), 80))}) for _ in range(30)]
    (root / "text.jsonl").write_text("\n".join(rows))
    return root


def arguments(root, out, *more):
    return [
        *("predict", "-m", str(root / "fatrelu_0.5"), "--data", str(root / "text.jsonl"), "--out", str(out)),
        *(
            "--tokens",
            "1024",
            "--context",
            "32",
            "--epochs",
            "1",
            "--rank",
            "32",
            "--device",
            "cpu",
            "--json",
        ),
        *more,
    ]


def test_all_kinds_at_once_and_again(folder, tmp_path, capsys):
    pytest.importorskip("torch")
    assert cli.main(arguments(folder, tmp_path, "--kind", "all")) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(first["ways"]) == ["lowrank", "published", "sketch", "sign"]
    assert first["ways"]["published"]["input"] == "residual"
    assert json.loads((tmp_path / "report.json").read_text()) == first
    assert (
        first["tokens"] == {"train": 928, "calibrate": 64, "report": 32}
        or sum(first["tokens"].values()) == 1024
    )
    for way in first["ways"].values():
        recalls = [point["recall"] for point in way["points"] if point["asked"] is not None]
        assert recalls == sorted(recalls)
        assert all(point["ppl_ratio"] > 0 for point in way["points"])
    model = open_model(tmp_path / "model.gguf")
    assert model.config.activation.name == "fatrelu"
    if model.predictors is None:
        assert any("no predictors" in note for note in first["notes"])
    else:
        assert model.predictors.kind == "lowrank"
        assert [fc1.shape for fc1, _ in model.predictors.networks] == [(32, 96)] * 2
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()}
    assert len(made) == 4
    assert cli.main(arguments(folder, tmp_path, "--kind", "all")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()} == made


def test_files_for_powerinfer(folder, tmp_path):
    torch = pytest.importorskip("torch")
    assert cli.main(arguments(folder, tmp_path, "--input", "residual", "--type", "f16")) == 0
    for layer in range(2):
        weights = torch.load(tmp_path / f"model_{layer}.pt", weights_only=True)
        assert {name: tuple(w.shape) for name, w in weights.items()} == {
            "fc1.weight": (32, 96),
            "fc2.weight": (160, 32),
        }
        assert all(w.dtype == torch.float16 and w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--recall", "1"], "share below 1"),
        (["--tokens", "64"], "3 are needed"),
        (["--max-gb", "0.00001"], "lower --tokens"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--rank", "40"], "another --rank"),
        (["--importance", "-1"], "exponent"),
    ],
)
def test_what_is_refused(folder, tmp_path, capsys, more, told):
    assert cli.main(arguments(folder, tmp_path, *more)) == 2
    assert told in capsys.readouterr().err


def test_dense_models_are_refused(folder, tmp_path, capsys):
    command = arguments(folder, tmp_path)
    command[2] = str(folder / "silu")
    assert cli.main(command) == 2
    assert "no exact zeros" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = """
import sys
from prosparse import cli
try:
    cli.main(["predict", "--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
