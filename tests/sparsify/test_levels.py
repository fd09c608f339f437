"""Changes that train rounded to two, three or five levels a row."""

import json

import numpy as np
import pytest

from prosparse.cli import main
from prosparse.formats import open_model
from prosparse.formats.hf import write_folder
from prosparse.model.coded import LEVELS
from prosparse.model.coded import coded as nearest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prosparse.sparsify import hf_model  # noqa: E402
from prosparse.sparsify.coded import LevelLinear, add, coded, parse_levels  # noqa: E402


def naive(change: np.ndarray, levels: int) -> np.ndarray:
    """As Eq. 6 of Ternary Weight Networks and Eq. 2 and 3 of BitDelta say it, weight by weight; of five
    levels, with the best step of the codes."""
    result = np.zeros(change.shape, np.float32)
    limits = {2: [-1.0], 3: [0.7], 5: [0.56, 1.68]}[levels]
    for row, values in enumerate(change.astype(np.float64)):
        mean = np.abs(values).mean()
        codes = [sum(abs(value) > limit * mean for limit in limits) for value in values]
        products = [code * abs(value) for code, value in zip(codes, values, strict=True)]
        step = np.float16(sum(products) / sum(code * code for code in codes)) if any(codes) else 0.0
        for column, value in enumerate(values):
            result[row, column] = -codes[column] * step if value < 0 else codes[column] * step
    return result


@pytest.mark.parametrize("levels", LEVELS)
def test_levels_are_those_of_the_papers(levels):
    change = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * 0.01
    change[3] = 0
    got = coded(change, levels).numpy()
    np.testing.assert_allclose(got, naive(change.numpy(), levels), rtol=1e-3, atol=1e-9)
    assert (np.sign(got[change.numpy() != 0]) * np.sign(change.numpy()[change.numpy() != 0]) >= 0).all()
    assert not got[3].any()
    steps = np.abs(got).max(1)
    assert (steps == steps.astype(np.float16)).all()


@pytest.mark.parametrize(
    ("levels", "normal", "laplace"), [(2, 0.365, 0.502), (3, 0.193, 0.286), (5, 0.084, 0.146)]
)
def test_little_is_left_out(levels, normal, laplace):
    rng = np.random.default_rng(2)
    for values, most in ((rng.standard_normal((128, 576)), normal), (rng.laplace(size=(128, 576)), laplace)):
        change = torch.from_numpy(values.astype(np.float32))
        assert (coded(change, levels) - change).square().sum() < most * change.square().sum()


@pytest.mark.parametrize("scale", [1, 0.7])
@pytest.mark.parametrize("levels", LEVELS)
def test_what_was_trained_is_found_exactly(levels, scale):
    rng = np.random.default_rng(3)
    base, latent = (x * rng.standard_normal((150, 67)).astype(np.float32) for x in (0.1, 0.01))
    change = coded(torch.from_numpy(latent), levels).numpy()
    found = nearest(base, np.float32(scale) * (base + change), levels)
    assert found.scale == pytest.approx(scale, rel=2e-7)
    codes = found.codes()
    assert np.array_equal(found.steps.dequantize()[:, None] * codes, change)


@pytest.mark.parametrize("levels", LEVELS)
def test_gradients_pass_through_the_rounding(levels):
    plain = torch.nn.Linear(9, 5, bias=False)
    layer = LevelLinear(plain, levels)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 9)
    y = layer(x)
    weight = plain.weight.detach() + coded(layer.weight.detach(), levels)
    torch.testing.assert_close(y, x @ weight.T)
    (y * torch.arange(5.0)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.arange(5.0)[:, None] * x.sum(0))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_kinds_without_levels():
    assert set(parse_levels("3:0")) == {"gate_proj", "up_proj", "down_proj"}
    assert parse_levels("0,v_proj=5") == {"v_proj": 5}
    with pytest.raises(ValueError, match="levels are 2, 3 or 5 of some matrices at least, as 3:0, not '0'"):
        parse_levels("0")


def test_it_begins_as_the_tuned_model_and_leaves_embeddings(tiny_model):
    original, tuned = tiny_model(tied=True), tiny_model(tied=True, seed=1)
    trunk = hf_model.load(original)
    kinds = ("gate_proj", "up_proj", "down_proj")
    count = add(trunk, dict.fromkeys(kinds, 3), tuned)
    for name, parameter in trunk.model.named_parameters():
        coding = any(kind in name for kind in kinds)
        theirs, ours = (model.tensors[name].dequantize() for model in (tuned, original))
        expected = theirs - ours if coding else theirs if parameter.ndim == 1 else ours
        torch.testing.assert_close(parameter.detach(), torch.from_numpy(expected))
        assert parameter.requires_grad == (coding or parameter.ndim == 1)  # neither attention nor embedding
    assert count == sum(p.numel() for p in trunk.model.parameters() if p.requires_grad)
    weights = hf_model.weights(trunk)
    name = "model.layers.1.mlp.up_proj.weight"
    before, after = (torch.from_numpy(m.tensors[name].dequantize()) for m in (original, tuned))
    torch.testing.assert_close(weights[name], before + coded(after - before, 3))


@pytest.mark.parametrize(
    ("start", "levels", "forms"),
    [
        (True, "3:2", ["--levels", "3:2"]),
        (True, "5:0", ["--levels", "5:0", "--rank", "1"]),
        (False, "3:2", ["--levels", "3:2"]),
    ],
)
def test_the_adapter_of_a_run_is_the_trained_model(tmp_path, tiny_model, capsys, start, levels, forms):
    """sparsify, sparsify --levels, convert --levels, convert --adapter: nothing is lost on the way."""
    write_folder(tmp_path / "base", tiny_model(tied=True, intermediate=96), "F32")
    row = json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 5}) + "\n"
    (tmp_path / "data.jsonl").write_text(row * 60)
    base, adapter = str(tmp_path / "base"), str(tmp_path / "a.gguf")
    common = ["sparsify", "-m", base, "--data", str(tmp_path / "data.jsonl"), "--context", "32", "--workers"]
    common += ["1", "--batch-tokens", "128", "--tokens", "2560", "--device", "cpu", "--type", "f32"]
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--out", str(second), "--levels", levels, "--target", "0.6"]
    if start:
        assert main([*common, "--out", str(first), "--keep-embeddings", "--target", "0.7"]) == 0
        options += ["--from", str(first / "model")]
    assert main([*common, *options]) == 0
    said = "k_proj, o_proj, q_proj, v_proj have 0 levels, a change of"
    assert (said in capsys.readouterr().out) == (levels == "5:0")
    last = json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["wanted"] == pytest.approx(0.6, abs=0.01)  # thresholds fell again, from 0.7
    trained = str(second / "model")
    assert main(["convert", trained, adapter, "--base", base, *forms]) == 0
    made = str(tmp_path / "made.gguf")
    assert main(["convert", base, made, "--adapter", adapter, "--type", "f32"]) == 0
    theirs, ours = open_model(trained), open_model(made)
    assert ours.config.activation.param == pytest.approx(theirs.config.activation.param)
    if levels == "5:0":
        name, start = "model.layers.0.self_attn.k_proj.weight", open_model(base)
        stayed = start.tensors[name].dequantize()
        assert np.array_equal(theirs.tensors[name].dequantize(), stayed)
        assert np.array_equal(ours.tensors[name].dequantize(), stayed)
    for name, tensor in theirs.tensors.items():
        np.testing.assert_allclose(
            ours.tensors[name].dequantize(), tensor.dequantize(), rtol=1e-5, atol=1e-7, err_msg=name
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--levels", "4", "--from", "M"], "levels are 2, 3 or 5, or 0"),
        (["--levels", "0", "--from", "M"], "levels are 2, 3 or 5 of some matrices at least"),
        (["--levels", "3,gate=2", "--from", "M"], "levels of 'gate': the kinds of matrices are gate_proj"),
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
