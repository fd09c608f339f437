"""Changes that train rounded to two or three levels a row."""

import json

import numpy as np
import pytest

from prosparse.cli import main
from prosparse.formats import open_model
from prosparse.formats.hf import write_folder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prosparse.sparsify import hf_model  # noqa: E402
from prosparse.sparsify.coded import CodedLinear, add, coded  # noqa: E402


def naive(change: np.ndarray, levels: int) -> np.ndarray:
    """As Eq. 6 of Ternary Weight Networks and Eq. 2 and 3 of BitDelta say it, weight by weight."""
    result = np.zeros(change.shape, np.float32)
    for row, values in enumerate(change.astype(np.float64)):
        limit = 0.7 * np.abs(values).mean() if levels == 3 else -1.0
        taken = [abs(value) for value in values if abs(value) > limit]
        step = np.float16(np.mean(taken)) if taken else 0.0
        for column, value in enumerate(values):
            if abs(value) > limit:
                result[row, column] = -step if value < 0 else step
    return result


@pytest.mark.parametrize("levels", [2, 3])
def test_levels_are_those_of_the_papers(levels):
    change = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * 0.01
    change[3] = 0
    got = coded(change, levels).numpy()
    np.testing.assert_allclose(got, naive(change.numpy(), levels), rtol=1e-3, atol=1e-9)
    assert (np.sign(got[change.numpy() != 0]) * np.sign(change.numpy()[change.numpy() != 0]) >= 0).all()
    assert not got[3].any()
    steps = np.abs(got).max(1)
    assert (steps == steps.astype(np.float16)).all()


@pytest.mark.parametrize("levels", [2, 3])
def test_gradients_pass_through_the_rounding(levels):
    plain = torch.nn.Linear(9, 5, bias=False)
    layer = CodedLinear(plain, levels)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 9)
    y = layer(x)
    weight = plain.weight.detach() + coded(layer.weight.detach(), levels)
    torch.testing.assert_close(y, x @ weight.T)
    (y * torch.arange(5.0)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.arange(5.0)[:, None] * x.sum(0))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_it_begins_as_the_tuned_model_and_leaves_embeddings(tiny_model):
    original, tuned = tiny_model(tied=True), tiny_model(tied=True, seed=1)
    trunk = hf_model.load(original)
    kinds = ("gate_proj", "up_proj", "down_proj")
    add(trunk, dict.fromkeys(kinds, 3), tuned)
    for name, parameter in trunk.model.named_parameters():
        coding = any(kind in name for kind in kinds)
        expected = tuned.tensors[name].dequantize()
        if coding:
            expected = expected - original.tensors[name].dequantize()
        if coding or parameter.ndim == 1:
            torch.testing.assert_close(parameter.detach(), torch.from_numpy(expected))
        assert parameter.requires_grad == ("embed" not in name)
    weights = hf_model.weights(trunk)
    name = "model.layers.1.mlp.up_proj.weight"
    before, after = (torch.from_numpy(m.tensors[name].dequantize()) for m in (original, tuned))
    torch.testing.assert_close(weights[name], before + coded(after - before, 3))


def test_the_adapter_of_a_run_is_the_trained_model(tmp_path, tiny_model):
    """sparsify, sparsify --levels, convert --levels, convert --adapter: nothing is lost on the way."""
    write_folder(tmp_path / "base", tiny_model(tied=True, intermediate=96), "F32")
    row = json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 5}) + "\n"
    (tmp_path / "data.jsonl").write_text(row * 60)
    base, adapter = str(tmp_path / "base"), str(tmp_path / "a.gguf")
    common = ["sparsify", "-m", base, "--data", str(tmp_path / "data.jsonl"), "--context", "32", "--workers"]
    common += ["1", "--batch-tokens", "128", "--tokens", "2560", "--device", "cpu", "--type", "f32"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*common, "--out", str(first), "--keep-embeddings", "--target", "0.7"]) == 0
    options = ["--out", str(second), "--from", str(first / "model"), "--levels", "3:2", "--target", "0.6"]
    assert main([*common, *options]) == 0
    last = json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["wanted"] == pytest.approx(0.6, abs=0.01)  # thresholds fell again
    trained = str(second / "model")
    assert main(["convert", trained, adapter, "--base", base, "--levels", "3:2"]) == 0
    made = str(tmp_path / "made.gguf")
    assert main(["convert", base, made, "--adapter", adapter, "--type", "f32"]) == 0
    theirs, ours = open_model(trained), open_model(made)
    assert ours.config.activation.param == pytest.approx(theirs.config.activation.param)
    for name, tensor in theirs.tensors.items():
        np.testing.assert_allclose(
            ours.tensors[name].dequantize(), tensor.dequantize(), rtol=1e-5, atol=1e-7, err_msg=name
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--levels", "4", "--from", "M"], "levels are 2 or 3"),
        (["--levels", "3:0", "--from", "M"], "levels are 2 or 3"),
        (["--levels", "3,gate_proj=0", "--from", "M"], "levels are 2 or 3"),
        (["--levels", "3,gate=2", "--from", "M"], "levels of 'gate': the kinds of matrices are gate_proj"),
        (["--levels", "3"], "--levels rounds what --from"),
        (["--concentration", "-1"], "must not be negative"),
        (["--l1", "0", "--concentration", "1"], "--concentration is for --target"),
    ],
)
def test_wrong_options(tmp_path, tiny_model, capsys, options, said):
    write_folder(tmp_path / "m", tiny_model(tied=True), "F32")
    options = [str(tmp_path / "m") if option == "M" else option for option in options]
    command = ["sparsify", "-m", str(tmp_path / "m"), "--data", "x", "--out", str(tmp_path / "o")]
    assert main([*command, *options, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err
