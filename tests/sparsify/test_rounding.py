"""Codes as fine as what they are worth: curvature and rounding against naive twins, sizes, and the verb."""

import json
from dataclasses import replace

import numpy as np
import pytest

from prosparse.cli import main
from prosparse.formats import adapter as files
from prosparse.formats import open_model
from prosparse.formats.convert import write_model
from prosparse.model.activation import Activation
from prosparse.model.adapter import apply, extract, kind_of
from prosparse.model.coded import Coded
from prosparse.model.fold import fold_thresholds
from prosparse.model.model import float32

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prosparse.sparsify import hf_model  # noqa: E402
from prosparse.sparsify.batches import Batch  # noqa: E402
from prosparse.sparsify.rounding import Curvature, Worth, adapter, rounded, worth  # noqa: E402

QUERIES, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def text(sequences=6, context=24, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, (sequences, context + 1))
    return Batch(tokens, np.ones_like(tokens, bool), np.zeros_like(tokens))


def tune(base, seed=1, thresholds=(0.02, 0.05)):
    """`base` with a change of all matrices, FATReLU, and thresholds folded into one."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, tensor in base.tensors.items():
        values = tensor.dequantize()
        if ".layers." in name:
            values = values + 0.1 * values.std() * rng.standard_normal(values.shape)
        tensors[name] = float32(values)
    config = replace(base.config, activation=Activation("fatrelu", 0.03))
    return fold_thresholds(replace(base, config=config, tensors=tensors, name="tuned"), thresholds, 0.03)


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model(type="Q8_0", hidden=64, intermediate=96, tied=True)


@pytest.fixture(scope="module")
def tuned(base):
    return tune(base)


@pytest.fixture(scope="module")
def found(tuned):
    return worth(hf_model.load(tuned), [text()], micro=2)


def random_curvature(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((columns, columns)) * np.exp(rng.standard_normal(columns))
    inputs = torch.from_numpy(rng.standard_normal((4 * columns, columns)) @ mixed).float()
    h, g = inputs.T @ inputs / len(inputs), torch.from_numpy(np.exp(2 * rng.standard_normal(rows))).float()
    return h, g


def damped(h, g):
    h = h.double() + 0.01 * h.double().diag().mean() * torch.eye(len(h))
    return h, g.double() + 0.01 * g.double().mean()


def test_what_inputs_are(tuned, found):
    trunk, batch = hf_model.load(tuned), text()
    seen = []
    layer = trunk.model.get_submodule(UP.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        trunk(torch.from_numpy(batch.tokens[:, :-1]))
    rows = torch.cat([x.flatten(0, 1) for x in seen]).double()
    expected = sum(torch.outer(row, row) for row in rows) / len(rows)
    assert torch.allclose(
        found.inputs[UP.replace("up_proj", "gate_proj")].double(), expected, rtol=1e-4, atol=1e-6
    )
    assert UP not in found.inputs and UP in found.outputs


def test_what_outputs_are_worth(base, tuned, found):
    """The mean square of derivatives, by finite differences, over all tokens that may be drawn."""
    trunk = hf_model.load(tuned).double()
    tokens = torch.from_numpy(text(1, 3).tokens[:, :-1])
    layer = trunk.model.get_submodule(QUERIES.removesuffix(".weight"))
    shift = torch.zeros(3, 64, dtype=torch.double)
    layer.register_forward_hook(lambda _, __, output: output + shift)

    def losses():
        with torch.no_grad():
            return -torch.nn.functional.linear(trunk(tokens), trunk.head).log_softmax(-1)[0]

    share, eps, row = (-losses()).exp(), 1e-4, 5
    expected = 0.0
    for place in range(3):
        shift[place, row] = eps
        above = losses()
        shift[place, row] = -eps
        slope = (above - losses()) / (2 * eps)
        shift[place, row] = 0
        # draws of different tokens are independent, and their derivatives' means are 0
        expected += float((share * slope**2).sum()) / 3
    many = [replace(text(1, 3), tokens=np.repeat(text(1, 3).tokens, 4000, 0))]
    measured = worth(hf_model.load(tuned), many, micro=500)
    assert measured.outputs[QUERIES][row] == pytest.approx(expected, rel=0.1)


def test_the_same_seed_the_same_draw(tuned, found):
    again = worth(hf_model.load(tuned), [text()], micro=2)
    assert torch.equal(again.outputs[UP], found.outputs[UP])
    other = worth(hf_model.load(tuned), [text()], micro=2, seed=1)
    assert not torch.equal(other.outputs[UP], found.outputs[UP])


def rounded_naively(change, h, curvature, step):
    """Optimal brain surgery, a column at a time, with the inverse of what is left taken anew for each."""
    change, codes = change.double().clone(), torch.zeros_like(change)
    steps = curvature.steps.mul(step).half().double()
    column_steps = curvature.column_steps.half().double()
    left = curvature.order.tolist()
    while left:
        column, *rest = left
        inverse = torch.linalg.inv(h[left][:, left])
        size = steps * column_steps[column]
        codes[:, column] = (change[:, column] / size).round()
        error = change[:, column] - codes[:, column] * size
        change[:, rest] -= error[:, None] * inverse[0, 1:] / inverse[0, 0]
        left = rest
    return codes


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 40), (5, 150)])
def test_rounding_against_the_naive_twin(shape):
    h, g = random_curvature(*shape)
    change = torch.from_numpy(np.random.default_rng(1).standard_normal(shape)).float()
    curvature = Curvature.of(h, g)
    for step in (0.3, 3.0):
        codes = rounded(change, curvature, step).codes
        expected = rounded_naively(change, damped(h, g)[0], curvature, step)
        # one that lies between two codes may fall on either side, and others after it
        assert (codes == expected).float().mean() > (0.99 if shape[1] < 100 else 0.9)


@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (5, 300)])
@pytest.mark.parametrize("step", [0.1, 2.0, 1e4])
def test_what_errors_cost(shape, step):
    h, g = random_curvature(*shape)
    change = torch.from_numpy(np.random.default_rng(1).standard_normal(shape)).float()
    result = rounded(change, Curvature.of(h, g), step)
    error = (change - result.change()).double()
    h, g = damped(h, g)
    assert result.cost == pytest.approx(0.5 * float((g * ((error @ h) * error).sum(1)).sum()), rel=1e-3)


def test_it_costs_less_than_nearest_codes():
    h, g = random_curvature(60, 200)
    change = torch.from_numpy(np.random.default_rng(1).standard_normal((60, 200))).float()
    curvature = Curvature.of(h, g)
    result = rounded(change, curvature, 1.0)
    sizes = result.steps[:, None] * result.column_steps
    error = (change - (change / sizes).round() * sizes).double()
    h, g = damped(h, g)
    assert result.cost < 0.6 * 0.5 * float((g * ((error @ h) * error).sum(1)).sum())


def test_inputs_and_outputs_that_never_are():
    """As those of neurons that are never active."""
    h, g = random_curvature(6, 10)
    h[3], h[:, 3], g[2] = 0, 0, 0
    change = torch.ones(6, 10)
    result = rounded(change, Curvature.of(h, g), 1.0)
    assert result.change().isfinite().all() and np.isfinite(result.cost)
    nothing = rounded(change, Curvature.of(0 * h, 0 * g), 1.0)
    assert nothing.change().isfinite().all()


def cost(base, made, tuned, found):
    """Nats a token, to second order."""
    total = 0.0
    for name, part in made.matrices.items():
        error = (part.merged(base.tensors[name].dequantize()) - tuned.tensors[name].dequantize()).astype(
            float
        )
        one = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        h = found.inputs[one].double().numpy()
        total += 0.5 * np.sum(found.outputs[name].double().numpy() * np.sum((error @ h) * error, axis=1))
    return total


def test_an_adapter_of_a_size(base, tuned, found, tmp_path):
    # weights of a trained model are worth more or less than each other, those of a random one hardly
    inputs = {name: random_curvature(1, len(h))[0] for name, h in found.inputs.items()}
    outputs = {name: random_curvature(len(g), 1)[1] for name, g in found.outputs.items()}
    found = Worth(inputs, outputs)
    levels = extract(base, tuned, levels=3)
    files.write(tmp_path / "levels.gguf", levels)
    size = (tmp_path / "levels.gguf").stat().st_size
    lines = []
    made = adapter(base, tuned, found, size, lines.append)
    files.write(tmp_path / "a.gguf", made)
    assert 0.8 * size < (tmp_path / "a.gguf").stat().st_size <= size
    assert "errors cost" in lines[-1] and "MB" in lines[-1]
    assert cost(base, made, tuned, found) < 0.5 * cost(base, levels, tuned, found)
    again = files.read(tmp_path / "a.gguf")
    for name, change in made.matrices.items():
        theirs = again.matrices[name]
        assert isinstance(theirs, Coded) and np.array_equal(theirs.codes(), change.codes())
    merged = apply(base, again)
    assert merged.config == tuned.config
    for name, tensor in tuned.tensors.items():
        if len(tensor.shape) == 1:
            assert np.array_equal(merged.tensors[name].dequantize(), tensor.dequantize())


def test_more_bytes_cost_less(base, tuned, found):
    costs = [
        cost(base, adapter(base, tuned, found, size), tuned, found) for size in (50_000, 70_000, 100_000)
    ]
    assert costs[0] > 2 * costs[1] > 4 * costs[2]


def test_thresholds_that_were_folded(base, tuned, found):
    made = adapter(base, tuned, found, 100_000)
    for name, part in made.matrices.items():
        folded = {"gate_proj", "up_proj"} & {kind_of(name)}
        assert (abs(part.scale - 1) > 0.2) == bool(folded)


def test_gates_of_other_activations_have_no_scale(base, tuned, found):
    dense = replace(tuned, config=replace(tuned.config, activation=Activation("silu")))
    made = adapter(base, dense, found, 100_000)
    assert {part.scale for part in made.matrices.values()} == {1.0}


def test_what_cannot_be(base, tuned, found, tiny_model):
    with pytest.raises(ValueError, match=r"an adapter of 0\.008 MB is too small for tuned"):
        adapter(base, tuned, found, 8_000)
    with pytest.raises(ValueError, match="intermediate_size is 96 in tuned and 64 in"):
        adapter(tiny_model(hidden=64, intermediate=64, tied=True), tuned, found, 100_000)
    bad = tuned.tensors[QUERIES].dequantize().copy()
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match=f"tensor {QUERIES} of tuned: NaN"):
        adapter(base, replace(tuned, tensors=dict(tuned.tensors) | {QUERIES: float32(bad)}), found, 100_000)


@pytest.fixture
def folder(base, tuned, tmp_path):
    write_model(tmp_path / "base.gguf", base, {"general.license": "mit"})
    write_model(tmp_path / "tuned.gguf", tuned)
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * 5}] * 20
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def convert(folder, *options):
    paths = [str(folder / name) for name in ("tuned.gguf", "a.gguf")]
    return main(["convert", *paths, "--base", str(folder / "base.gguf"), *options])


def test_the_verb(folder, capsys):
    options = ["--data", str(folder / "data.jsonl"), "--tokens", "512", "--name", "N", "--json"]
    assert convert(folder, "--size", "0.1", *options, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert "what weights are worth, on 513 tokens" in err and "errors cost" in err
    assert "kept" not in json.loads(out.splitlines()[-1])
    assert (folder / "a.gguf").stat().st_size <= 100_000
    made = files.read(folder / "a.gguf")
    assert (made.name, made.license) == ("N", "mit")
    merged = apply(open_model(folder / "base.gguf"), made)
    tuned = open_model(folder / "tuned.gguf").tensors[UP].dequantize()
    assert np.abs(merged.tensors[UP].dequantize() - tuned).max() < 0.1 * np.abs(tuned).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0.1"], "--size needs --data"),
        (["--size", "0", "--data", "data.jsonl"], "--size is in MB, and above 0, not 0"),
        (["--size", "nan", "--data", "data.jsonl"], "--size is in MB, and above 0, not nan"),
        (["--data", "data.jsonl"], "--data, --tokens and --device are of --size"),
        (["--tokens", "64"], "--data, --tokens and --device are of --size"),
        (["--size", "1", "--data", "a", "--data", "a"], "a source of --data is there twice"),
        (["--size", "1", "--data", "data.jsonl", "--levels", "3"], "--size chooses codes itself"),
        (["--size", "1", "--data", "data.jsonl", "--type", "q8_0"], "--size chooses codes itself"),
        (["--size", "0.01", "--data", "data.jsonl"], "an adapter of 0.01 MB is too small"),
        (["--size", "1", "--data", "data.jsonl", "--tokens", "0"], "tokens do not fill a sequence"),
        (["--size", "1", "--data", "data.jsonl", "--device", "nowhere"], "--device nowhere"),
        (["--size", "1", "--data", "missing.jsonl"], r"missing\.jsonl"),
    ],
)
def test_options_that_do_not_fit(folder, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    assert convert(folder, *options) == 2
    assert message.replace("\\", "") in capsys.readouterr().err
    assert not (folder / "a.gguf").exists()


def test_a_size_without_a_base(folder, capsys):
    paths = [str(folder / name) for name in ("tuned.gguf", "out.gguf")]
    assert main(["convert", *paths, "--size", "1"]) == 2
    assert "--size is of an adapter to be written: add --base" in capsys.readouterr().err
