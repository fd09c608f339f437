"""Codes of an adapter that train on its steps."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from prosparse.cli import main
from prosparse.formats import adapter as files
from prosparse.formats import open_model
from prosparse.formats.hf import write_folder
from prosparse.model.adapter import ATTENTION, FFN, apply, extract
from prosparse.model.coded import Coded, encoded, float16

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prosparse.sparsify import budget, hf_model  # noqa: E402
from prosparse.sparsify.coded import GridLinear, add_grid, codes_of  # noqa: E402

DOWN = "model.layers.1.mlp.down_proj.weight"


def change(rows, columns, seed=0, with_columns=True):
    rng = np.random.default_rng(seed)
    steps = float16(0.02 * (1 + rng.random(rows)))
    column_steps = float16(np.exp(rng.standard_normal(columns))) if with_columns else None
    return Coded(1.0, columns, steps, column_steps, encoded(np.rint(rng.standard_normal((rows, columns)))))


@pytest.mark.parametrize("with_columns", [True, False])
def test_it_begins_with_the_codes_and_rounds_to_the_nearest(with_columns):
    plain, coded = torch.nn.Linear(9, 5, bias=False), change(5, 9, with_columns=with_columns)
    layer = GridLinear(plain, coded)
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(coded.merged(plain.weight.detach().numpy())).T)
    sizes = layer.steps * layer.column_steps
    with torch.no_grad():
        layer.weight += 0.4 * sizes
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(coded.merged(plain.weight.detach().numpy())).T)
    with torch.no_grad():
        layer.weight += 0.2 * sizes
    codes = codes_of(layer.weight.detach(), layer.steps, layer.column_steps).numpy()
    assert np.array_equal(codes, coded.codes() + 1)
    (layer(x) * torch.arange(5.0)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.arange(5.0)[:, None] * x.sum(0))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_steps_of_0_and_codes_without_end():
    change, steps = torch.tensor([[1e30, -1e30, 1.0]]), torch.tensor([[0.5]])
    assert codes_of(change, steps, torch.tensor([1.0, 1.0, 0.0])).tolist() == [[32767, -32767, 0]]


@pytest.fixture
def folder(tmp_path, tiny_model):
    """base, data.jsonl, first/model with thresholds, and its adapter a.gguf of 0.06 MB."""
    write_folder(tmp_path / "base", tiny_model(tied=True, intermediate=96), "F32")
    row = json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 5}) + "\n"
    (tmp_path / "data.jsonl").write_text(row * 60)
    options = ["--out", str(tmp_path / "first"), "--keep-embeddings", "--target", "0.7", "--type", "f32"]
    assert train(tmp_path, *options) == 0
    command = ["convert", str(tmp_path / "first" / "model"), str(tmp_path / "a.gguf")]
    command += ["--base", str(tmp_path / "base"), "--size", "0.06", "--name", "Sparse"]
    assert main([*command, "--data", str(tmp_path / "data.jsonl"), "--tokens", "256", "--device", "cpu"]) == 0
    return tmp_path


def words(folder):
    command = [
        "sparsify",
        "-m",
        str(folder / "base"),
        "--data",
        str(folder / "data.jsonl"),
        "--context",
        "32",
    ]
    command += ["--workers", "1", "--batch-tokens", "128", "--tokens", "2560", "--device", "cpu"]
    return command


def train(folder, *options):
    return main([*words(folder), *options])


def test_a_run_writes_the_adapter_of_its_model(folder, capsys):
    options = ["--codes", str(folder / "a.gguf"), "--target", "0.6", "--type", "f32", "--lr", "1e-3"]
    out = folder / "second"
    assert train(folder, "--out", str(out), *options) == 0
    assert "adapter.gguf: " in capsys.readouterr().out
    base, before = open_model(folder / "base"), files.read(folder / "a.gguf")
    after = files.read(out / "adapter.gguf")
    (row,) = json.loads((out / "report.json").read_text())["rows"]
    assert after.name == before.name == "Sparse"
    assert after.measured == {
        "held_out_tokens": row["tokens"],
        "loss": round(row["sparse"], 4),
        "original_loss": round(row["original"], 4),
        "sparsity": round(row["sparsity"], 4),
        "tokens": 2560,
    }
    theirs, ours = open_model(out / "model"), apply(base, after)
    assert ours.config.activation.param == pytest.approx(theirs.config.activation.param)
    for name, tensor in theirs.tensors.items():
        expected = tensor.dequantize()
        np.testing.assert_allclose(
            ours.tensors[name].dequantize(), expected, rtol=1e-5, atol=1e-6, err_msg=name
        )
    moved = [np.mean(part.codes() != before.matrices[name].codes()) for name, part in after.matrices.items()]
    assert 0.01 < np.mean(moved) < 0.9
    for name, part in after.matrices.items():
        assert np.array_equal(part.steps.data, before.matrices[name].steps.data)
        assert np.array_equal(part.column_steps.data, before.matrices[name].column_steps.data)
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["sparsity"] == pytest.approx(0.7, abs=0.1)  # with the thresholds that the adapter has


def test_it_begins_as_the_model_of_the_adapter(folder):
    base, made = open_model(folder / "base"), files.read(folder / "a.gguf")
    trunk = hf_model.load(base)
    count = add_grid(trunk, made, base.config)
    assert count == sum(p.numel() for p in trunk.model.parameters() if p.requires_grad)
    found, expected = hf_model.weights(trunk), apply(base, made)
    for name, tensor in expected.tensors.items():
        scale = made.matrices[name].scale if name in made.matrices else 1
        values = torch.from_numpy(tensor.dequantize() / np.float32(scale))
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit(folder, tiny_model, capsys):
    out = ["--out", str(folder / "bad")]
    codes = ["--codes", str(folder / "a.gguf")]
    assert train(folder, *out, *codes, "--from", str(folder / "first" / "model")) == 2
    assert "--codes does not go with --shard, --from" in capsys.readouterr().err
    assert train(folder, *out, *codes, "--l1", "0") == 2
    assert "has thresholds, which only --target goes on with" in capsys.readouterr().err
    base, tuned = open_model(folder / "base"), open_model(folder / "first" / "model")
    forms = dict.fromkeys(ATTENTION, 4), dict.fromkeys(FFN, 3)
    files.write(folder / "mixed.gguf", extract(base, tuned, *forms))
    assert train(folder, *out, "--codes", str(folder / "mixed.gguf")) == 2
    assert "codes of all matrices are needed" in capsys.readouterr().err
    made = files.read(folder / "a.gguf")
    scaled = replace(made.matrices[DOWN], scale=0.9)
    files.write(folder / "scaled.gguf", replace(made, matrices=dict(made.matrices) | {DOWN: scaled}))
    assert train(folder, *out, "--codes", str(folder / "scaled.gguf")) == 2
    assert f"the adapter scales {DOWN} by 0.9" in capsys.readouterr().err
    write_folder(folder / "base", tiny_model(tied=True, intermediate=96, seed=5), "F32")
    assert train(folder, *out, *codes) == 2
    assert "is of a model with the fingerprint" in capsys.readouterr().err


def grown(run):
    """Bytes of the adapter of a run, and what its last measurement took them for."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (run / "adapter.gguf").stat().st_size, steps[-1]["size"]


def test_a_file_that_would_grow_is_kept_to_its_size(folder, monkeypatch, capsys):
    monkeypatch.setattr(budget, "_EVERY", 4)
    codes = ["--codes", str(folder / "a.gguf"), "--target", "0.7", "--type", "f32", "--lr", "1e-3"]
    sizes = []
    for size in ([], ["--size", "0.08"], ["--size", "9"]):
        out = folder / f"run{len(sizes)}"
        assert train(folder, "--out", str(out), *codes, *size, "--tokens", "20480") == 0
        found, measured = grown(out)
        assert abs(found / measured - 1) < 0.15  # by two rows of a matrix
        sizes.append(found)
    before = (folder / "a.gguf").stat().st_size
    assert 0.8 * before < sizes[0] < 1.05 * before and 0.8 * 80e3 < sizes[1] < 1.05 * 80e3
    assert sizes[2] > 1.5 * before
    for size in ("0.001", "0", "-1", "nan", "inf"):
        assert train(folder, "--out", str(folder / "bad"), *codes, f"--size={size}") == 2
        assert f"that the adapter has without any codes, not {size}" in capsys.readouterr().err
    assert not (folder / "bad").exists()
    assert train(folder, "--out", str(folder / "bad"), "--size", "1") == 2
    assert "--size is of the adapter that --codes trains" in capsys.readouterr().err


def test_without_the_original_as_a_teacher(folder):
    codes = ["--codes", str(folder / "a.gguf"), "--target", "0.7", "--type", "f32"]
    out = folder / "alone"
    assert train(folder, "--out", str(out), *codes, "--distil", "0", "--next-token", "1") == 0
    assert files.read(out / "adapter.gguf").measured["tokens"] == 2560


def test_a_run_that_goes_on_keeps_to_the_size_as_one_without_a_break(folder, monkeypatch):
    monkeypatch.setattr(budget, "_EVERY", 4)
    codes = ["--codes", str(folder / "a.gguf"), "--target", "0.7", "--type", "f32", "--lr", "1e-3"]
    codes += ["--tokens", "5120", "--checkpoint-every", "10"]
    assert train(folder, "--out", str(folder / "whole"), *codes) == 0
    share, steps = budget.Budget.share, []

    def stops(self, step):
        steps.append(step)
        if len(steps) == 26:
            raise RuntimeError("no power")
        return share(self, step)

    monkeypatch.setattr(budget.Budget, "share", stops)
    with pytest.raises(RuntimeError, match="no power"):
        train(folder, "--out", str(folder / "broken"), *codes)
    assert train(folder, "--out", str(folder / "broken"), *codes) == 0
    assert steps[25:] == [26, *range(21, 41)]
    whole, broken = (
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "broken")
    )
    assert whole == broken
    ours, theirs = (files.read(folder / name / "adapter.gguf") for name in ("whole", "broken"))
    assert all(
        np.array_equal(ours.matrices[name].codes(), part.codes()) for name, part in theirs.matrices.items()
    )


def test_two_processes_train_the_codes_that_one_does(folder):
    # a size that changes must shrink to, on both alike
    codes = ["--codes", str(folder / "a.gguf"), "--size", "0.05", "--target", "0.7", "--type", "f32"]
    codes += ["--micro", "2"]
    assert train(folder, "--out", str(folder / "one"), *codes) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "prosparse", *words(folder), "--out", str(folder / "two"), *codes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = (files.read(folder / name / "adapter.gguf") for name in ("one", "two"))
    differ = [np.mean(ours.matrices[n].codes() != part.codes()) for n, part in theirs.matrices.items()]
    assert np.mean(differ) < 1e-3
