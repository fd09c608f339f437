"""Loss, sparsity and calibrated thresholds against brute force."""

import json
from dataclasses import replace

import numpy as np
import pytest

from prosparse.model.chat import CHATML
from prosparse.sparsify import measure
from prosparse.sparsify.batches import Batch
from prosparse.sparsify.tokens import Encoder, build
from tiny import byte_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

CONTEXT = 16


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(byte_tokenizer(288), bos_id=256, eos_ids=(257,), chat_template=CHATML)


def batch_of(sequences: int, context: int = CONTEXT, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (sequences, context + 1))
    return Batch(tokens, rng.random(tokens.shape) < 0.7, np.zeros(tokens.shape, np.int32))


def trunk_of(model):
    return measure.load(model, "cpu")[0]


def gate_and_up(trunk, tokens: np.ndarray) -> tuple[list, list, list]:
    """Inputs, gate x and up x by layer, [tokens, ...], seen from outside the MLPs."""
    seen: tuple[list, list, list] = ([], [], [])
    hooks = []
    for mlp in trunk.mlps:
        hooks.append(mlp.register_forward_pre_hook(lambda _, x: seen[0].append(x[0].flatten(0, 1))))
        hooks.append(mlp.gate_proj.register_forward_hook(lambda _, x, y: seen[1].append(y.flatten(0, 1))))
        hooks.append(mlp.up_proj.register_forward_hook(lambda _, x, y: seen[2].append(y.flatten(0, 1))))
    with torch.no_grad():
        trunk.hidden(torch.from_numpy(tokens))
    for hook in hooks:
        hook.remove()
    return seen


ROWS = [
    {"text": "first"},
    {"prompt": "Hi", "response": "Yes?"},
    {"text": "a longer document about nothing in particular, and a little more"},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.jsonl"
    # what comes after the needed rows is not even read
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    return str(path)


@pytest.mark.parametrize(("tokens", "context"), [(16, 16), (31, 8), (100, 7), (5, 1)])
def test_a_sample_is_the_start_of_its_source(source, encoder, tokens, context):
    from prosparse.sparsify.corpus import row_of

    rows = [encoder.encode(row_of(row, "")) for row in ROWS]
    ids = np.concatenate([ids for ids, _ in rows])
    loss = np.concatenate([loss for _, loss in rows])
    place = np.concatenate([[i] * len(ids) for i, (ids, _) in enumerate(rows)])
    batch = measure.sample(source, encoder, tokens, context)
    assert batch.tokens.shape == batch.loss.shape == (tokens // context, context + 1)
    assert (batch.tokens.dtype, batch.loss.dtype, batch.document.dtype) == (np.int64, bool, np.int32)
    for i in range(tokens // context):
        part = slice(i * context, (i + 1) * context + 1)
        assert batch.tokens[i].tolist() == ids[part].tolist()
        assert batch.loss[i].tolist() == (loss[part] == 1).tolist()
        assert batch.document[i].tolist() == (place[part] - place[part][0]).tolist()


def test_a_sample_of_a_store_is_that_of_its_source(encoder, tmp_path):
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    store = build(str(source), encoder, tmp_path / "cache", workers=1)
    ours, theirs = (measure.sample(str(one), encoder, 96, 32) for one in (store.folder, source))
    for part in ("tokens", "loss", "document"):
        assert np.array_equal(getattr(ours, part), getattr(theirs, part))
    other = replace(encoder, bos_id=None)
    with pytest.raises(ValueError, match="holds the tokens of another tokenizer"):
        measure.sample(str(store.folder), other, 96, 32)


def test_a_source_that_ends_early(tmp_path, encoder):
    path = tmp_path / "short.txt"
    path.write_text("x" * 38)  # and BOS and EOS: 40 tokens
    assert measure.sample(str(path), encoder, 1000, 13).tokens.shape == (3, 14)
    assert measure.sample(str(path), encoder, 1000, 39).tokens.shape == (1, 40)
    with pytest.raises(ValueError, match="has 40 tokens, one sequence needs 41"):
        measure.sample(str(path), encoder, 1000, 40)
    with pytest.raises(ValueError, match="raise --tokens"):
        measure.sample(str(path), encoder, 12, 13)
    with pytest.raises(ValueError, match="does not exist"):
        measure.sample(str(tmp_path / "none.txt"), encoder, 100, 10)


def test_split_and_join():
    batch = batch_of(5)
    first, others = measure.split(batch, 2)
    assert (len(first.tokens), len(others.tokens)) == (2, 3)
    again = measure.join([first, others])
    for name in ("tokens", "loss", "document"):
        assert np.array_equal(getattr(again, name), getattr(batch, name))


@pytest.mark.parametrize("act", ["silu", "relu", "fatrelu_0.3", "shiftrelu_0.2"])
@pytest.mark.parametrize("micro", [1, 2, 8])
def test_loss_and_sparsity_are_those_of_the_naive_engine(tiny_model, act, micro):
    from prosparse.engine.engine import LLM

    model = tiny_model(act=act)
    batch = batch_of(3)
    seen = []
    trunk = trunk_of(model)
    measured = measure.measure(trunk, batch, micro=micro, observe=lambda layer, x1: seen.append((layer, x1)))
    losses, learnt = [], 0
    for tokens, learn in zip(batch.tokens, batch.loss, strict=True):
        logits = LLM(model, backend="naive").forward(tokens[:-1], all_logits=True).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-(log_p[np.arange(CONTEXT), tokens[1:]] * learn[1:]).sum())
        learnt += learn[1:].sum()
    assert measured.tokens == learnt
    assert measured.loss == pytest.approx(sum(losses) / learnt, rel=1e-5)
    _, gates, ups = gate_and_up(trunk, batch.tokens[:, :-1])
    activation = model.config.activation
    for layer, (gate, up) in enumerate(zip(gates, ups, strict=True)):
        x1 = activation(gate.numpy()) * up.numpy()
        assert measured.sparsity[layer] == pytest.approx((x1 == 0).mean(), abs=1e-4)
    assert [layer for layer, _ in seen] == [0, 1] * -(-3 // micro)
    assert sum(x1.shape[0] for layer, x1 in seen if layer == 0) == 3
    assert not any(x1.requires_grad for _, x1 in seen)


def test_the_chunks_of_the_head_add_up(tiny_model, monkeypatch):
    trunk, batch = trunk_of(tiny_model()), batch_of(4)
    whole = measure.measure(trunk, batch)
    monkeypatch.setattr(measure, "_CHUNK", 7)
    assert measure.measure(trunk, batch).loss == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_it_was(tiny_model, breaks):
    trunk = trunk_of(tiny_model(act="relu"))
    trunk.model.train()
    trunk.mlps[1].eval()
    marks = [object() for _ in trunk.mlps]
    for mlp, mark in zip(trunk.mlps, marks, strict=True):
        mlp.observe = mark

    def observe(layer, x1):
        assert not trunk.mlps[0].training
        if breaks:
            raise KeyError("broken")

    try:
        measure.measure(trunk, batch_of(2), observe=observe)
    except KeyError:
        assert breaks
    assert trunk.model.training
    assert [mlp.training for mlp in trunk.mlps] == [True, False]
    assert [mlp.observe for mlp in trunk.mlps] == marks
    assert torch.is_grad_enabled()


def test_bfloat16_is_near(tiny_model):
    trunk, batch = trunk_of(tiny_model(act="fatrelu_0.3")), batch_of(4)
    exact, rough = (measure.measure(trunk, batch, bfloat16=b) for b in (False, True))
    assert rough.loss == pytest.approx(exact.loss, rel=2e-2)
    assert rough.loss != exact.loss
    np.testing.assert_allclose(rough.sparsity, exact.sparsity, atol=0.02)


def test_numbers_that_are_not_finite_are_told(tiny_model):
    trunk, batch = trunk_of(tiny_model(act="fatrelu_0.1")), batch_of(2)
    # nothing is learnt where it shows
    batch.loss[1] = False
    trunk.model.model.embed_tokens.weight.data[batch.tokens[1, -2]] = float("nan")
    with pytest.raises(ValueError, match="loss is not finite"):
        measure.measure(trunk, batch)
    with pytest.raises(ValueError, match="not finite"):
        measure.Calibration(trunk, batch)
    trunk = trunk_of(tiny_model(act="fatrelu_0.1"))
    trunk.mlps[1].gate_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="layer 1 has gate weights"):
        measure.measure(trunk, batch)


def test_samples_that_cannot_be_measured(tiny_model):
    trunk, batch = trunk_of(tiny_model()), batch_of(2)
    with pytest.raises(ValueError, match="no token to learn"):
        measure.measure(trunk, Batch(batch.tokens, np.zeros_like(batch.loss), batch.document))
    batch.tokens[0, 0] = 288
    with pytest.raises(ValueError, match="holds token 288, the model knows 288"):
        measure.measure(trunk, batch)


def test_an_unknown_device(tiny_model):
    with pytest.raises(ValueError, match="--device nothing"):
        measure.load(tiny_model(), "nothing")


@pytest.mark.parametrize("act", ["relu", "fatrelu_0.4"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_quantiles_are_those_of_the_open_gates(tiny_model, act, share):
    trunk, batch = trunk_of(tiny_model(act=act)), batch_of(5)
    own = float(trunk.mlps[0].threshold)
    got = measure.Calibration(trunk, batch, micro=2).quantile(share)
    _, gates, _ = gate_and_up(trunk, batch.tokens[:, :-1])
    for layer, gate in enumerate(gates):
        values = gate.double().numpy()
        expected = np.quantile(values[(values > 0) & (values >= own)], share)
        assert got[layer] == pytest.approx(expected, rel=1e-5)
        assert got[layer] >= own


@pytest.mark.parametrize("act", ["relu", "fatrelu_0.4"])
@pytest.mark.parametrize("limit", [0.0, 0.05, 0.2, 0.7])
def test_cett_is_the_greatest_within_the_limit(tiny_model, act, limit):
    """Every open gate as a threshold, in float64."""
    model = tiny_model(act=act, hidden=32, intermediate=64)
    trunk, batch = trunk_of(model), batch_of(2, 8)
    got = measure.Calibration(trunk, batch).cett(limit)
    _, gates, ups = gate_and_up(trunk, batch.tokens[:, :-1])
    for layer, (gate, up) in enumerate(zip(gates, ups, strict=True)):
        gate, up = gate.double().numpy(), up.double().numpy()
        down = model.tensors[f"model.layers.{layer}.mlp.down_proj.weight"].dequantize().astype(np.float64)
        x1 = np.where(gate >= model.config.activation.param, np.maximum(gate, 0), 0) * up
        full = np.linalg.norm(x1 @ down.T, axis=1)
        errors = {}
        for value in np.sort(gate[(gate > 0) & (gate >= model.config.activation.param)]):
            dropped = np.linalg.norm(np.where(gate < value, x1, 0) @ down.T, axis=1)
            errors[value] = (dropped / full).mean()
        values = np.array(list(errors))
        at = int(np.abs(values - got[layer]).argmin())
        assert got[layer] == pytest.approx(values[at], rel=1e-6)
        shares = np.array(list(errors.values()))
        assert shares[at] <= limit + 1e-9
        assert at + 1 == len(shares) or shares[at + 1] > limit
        # the error rises with the threshold but for small wiggles, so this is also the greatest
        assert not (shares[at + 1 :] < limit - 0.01).any()


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [1, 7, 33, 80, 1000])
def test_calibration_keeps_evenly_spaced_tokens(tiny_model, micro, most):
    trunk, batch = trunk_of(tiny_model(act="relu")), batch_of(5)
    inputs, _, _ = gate_and_up(trunk, batch.tokens[:, :-1])
    known = measure.Calibration(trunk, batch, micro=micro, most=most)
    stride = -(-80 // min(most, 80))
    for layer, expected in enumerate(inputs):
        kept = known.inputs[layer]
        assert len(kept) <= most
        torch.testing.assert_close(kept, expected[::stride], rtol=1e-4, atol=1e-4)
    assert not any(mlp._forward_pre_hooks for mlp in trunk.mlps)


def test_a_layer_without_open_gates_keeps_its_threshold(tiny_model):
    trunk, batch = trunk_of(tiny_model(act="fatrelu_0.4")), batch_of(2)
    trunk.mlps[1].gate_proj.weight.data.zero_()
    known = measure.Calibration(trunk, batch)
    for got in (known.quantile(0.5), known.cett(0.5)):
        assert got[0] > 0.4
        assert got[1] == pytest.approx(0.4)
    trunk.mlps[0].up_proj.weight.data.zero_()  # gates are open, but nothing comes out
    assert measure.Calibration(trunk, batch).cett(0.5)[0] == pytest.approx(0.4)
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="below 1"):
            known.quantile(bad)
        with pytest.raises(ValueError, match="below 1"):
            known.cett(bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_gpu_gives_the_same(tiny_model, bfloat16):
    from prosparse.sparsify import stats, threshold

    model, batch = tiny_model(act="fatrelu_0.3"), batch_of(6)
    cpu, (gpu, half) = trunk_of(model), measure.load(model, "cuda")
    assert half
    tolerance = 2e-2 if bfloat16 else 1e-3
    expected = measure.measure(cpu, batch)
    got = measure.measure(gpu, batch, micro=4, bfloat16=bfloat16)
    assert got.loss == pytest.approx(expected.loss, rel=tolerance)
    np.testing.assert_allclose(got.sparsity, expected.sparsity, atol=tolerance)
    ours = measure.Calibration(gpu, batch, bfloat16=bfloat16)
    theirs = measure.Calibration(cpu, batch)
    np.testing.assert_allclose(ours.quantile(0.3), theirs.quantile(0.3), rtol=tolerance)
    np.testing.assert_allclose(ours.cett(0.1), theirs.cett(0.1), rtol=2 * tolerance)
    values = {"grid": (0.5,), "quantile": (0.2,), "cett": (0.1,)}
    on_gpu, on_cpu = (
        threshold.search(trunk, batch, batch, values, bfloat16=bfloat16 and trunk is gpu)
        for trunk in (gpu, cpu)
    )
    for a, b in zip(on_gpu.points, on_cpu.points, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=tolerance)
        assert a.sparsity == pytest.approx(b.sparsity, abs=tolerance)
    counted = stats.collect(
        gpu, {"a": batch}, model="m", activation=model.config.activation, bfloat16=bfloat16
    )
    np.testing.assert_allclose(counted.sparsity[0], got.sparsity, atol=1e-3)
