"""Networks of one layer: the published loss and recipe, the linear start, folding, resuming by seed."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prosparse.model.predictor import scores  # noqa: E402
from prosparse.predictor import metrics, train  # noqa: E402
from prosparse.predictor.collect import pack  # noqa: E402
from prosparse.predictor.networks import scorer  # noqa: E402
from prosparse.predictor.train import Examples, Training  # noqa: E402

D, D_FF = 32, 45
FAST = {"batch": 64, "learning_rate": 6e-3, "decay": True}


def layer(n: int = 700, held: int = 200, seed: int = 0, unit: bool = False):
    """A gate of falling singular values, inputs with a mean, and the neurons above a threshold."""
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((D_FF, D)) @ np.diag(0.8 ** np.arange(D)) @ rng.standard_normal((D, D))
    gate = (basis / np.sqrt(D)).astype(np.float32)
    x = rng.standard_normal((n + held, D)) + rng.standard_normal(D)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True))
    active = x @ gate.T > 1.0
    if unit:
        x *= 10 ** rng.uniform(-1, 2, (len(x), 1))
    x = x.astype(np.float16)
    bits = pack(active)
    return Examples(x[:n], bits[:n], x[n:], bits[n:], D_FF, unit=unit), gate


def judged(examples, networks, recall=0.95, normed=False):
    """Predicted sparsity at a recall on the held-out examples, by the folded networks."""
    score = scorer("lowrank", networks)
    (at,) = metrics.calibrate(score, examples.held_inputs, examples.held_labels, [recall])
    (counts,) = metrics.count(score, examples.held_inputs, examples.held_labels, [at])
    return counts.predicted_sparsity, at


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5])
def test_the_published_loss_by_its_formula(density):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 30, generator=generator, dtype=torch.float64)
    y = (torch.rand(50, 30, generator=generator) < density).double()
    total = 0.0
    weight = float(y.mean()) + 0.005
    for logit, label in zip(logits.flatten().tolist(), y.flatten().tolist(), strict=True):
        p = 1 / (1 + np.exp(-logit))
        loss_weight = label * (1 - weight) + weight
        total -= loss_weight * (label * np.log(p) + (1 - label) * np.log(1 - p))
    assert float(train.published_loss(logits, y)) == pytest.approx(total / y.numel(), rel=1e-9)
    probs = torch.sigmoid(logits)
    expected = torch.nn.functional.binary_cross_entropy(probs, y, weight=y * (1 - weight) + weight)
    assert float(train.published_loss(logits, y)) == pytest.approx(float(expected), rel=1e-9)


def test_published_networks_keep_the_checkpoint_of_the_best_recall():
    examples, _ = layer()
    seen = []
    training = Training(16, epochs=6, batch=64, seed=3)
    fc1, fc2 = train.train_published(examples, training, progress=lambda epoch, recall: seen.append(recall))
    assert (fc1.shape, fc2.shape) == ((16, D), (D_FF, 16))
    score = scorer("lowrank", (fc1, fc2))
    (counts,) = metrics.count(score, examples.held_inputs, examples.held_labels, [0.0])
    assert counts.recall >= max(seen) - 1e-3
    again = train.train_published(examples, training)
    assert np.array_equal(again[0], fc1) and np.array_equal(again[1], fc2)
    other = train.train_published(examples, Training(16, epochs=6, batch=64, seed=4))
    assert not np.array_equal(other[0], fc1)


def test_published_training_ends_early():
    examples, _ = layer()
    seen = []
    train.train_published(
        examples, Training(8, epochs=50, batch=64, patience=2), progress=lambda epoch, _: seen.append(epoch)
    )
    assert len(seen) < 50
    seen.clear()
    easy = Training(8, epochs=50, batch=64, enough=0.0)
    train.train_published(examples, easy, progress=lambda epoch, _: seen.append(epoch))
    assert len(seen) == 1


def test_the_start_of_full_rank_is_the_gate():
    examples, gate = layer()
    (found,) = train.untrained(examples, gate, 1.0, 0.95, [D + 1])
    held = examples.held_inputs.astype(np.float32) @ gate.T
    (at,) = metrics.calibrate(
        lambda x: x @ torch.from_numpy(gate).T, examples.held_inputs, examples.held_labels, [0.95]
    )
    # the constant of 32 noisy inputs is not quite one
    assert found == pytest.approx(1 - (held >= at).mean(), abs=0.03)


def test_more_rank_predicts_more_from_the_start():
    examples, gate = layer()
    found = train.untrained(examples, gate, 1.0, 0.95, [2, 6, 12, 24, 40])
    assert found[:4] == sorted(found[:4]) and found[3] > found[0] + 0.2
    assert found[4] == pytest.approx(found[3], abs=0.05)


@pytest.mark.parametrize("unit", [False, True])
def test_training_gains_and_folds_without_loss(unit):
    examples, gate = layer(unit=unit)
    # not quite the right one, so that there is something to learn
    gate = gate + 0.5 * gate.std() * np.random.default_rng(1).standard_normal(gate.shape).astype(np.float32)
    (start,) = train.untrained(examples, gate, 1.0, 0.95, [8])
    seen = []
    training = Training(8, epochs=8, **FAST)
    networks = train.train_lowrank(
        examples, gate, 1.0, 0.95, training, progress=lambda epoch, value: seen.append(value)
    )
    assert [weight.shape for weight in networks] == [(8, D), (D_FF, 8)]
    assert all(weight.dtype == np.float32 for weight in networks)
    assert max(seen) > start + 0.01
    # the threshold lies at 0, where raw inputs of any size are decided alike
    x = torch.from_numpy(examples.held_inputs.astype(np.float32))
    score = scorer("lowrank", networks)
    (counts,) = metrics.count(lambda x: score(x) + 1e-4, examples.held_inputs, examples.held_labels, [0.0])
    assert counts.recall == pytest.approx(0.95, abs=0.01)
    assert counts.predicted_sparsity == pytest.approx(max(seen), abs=0.01)
    torch.testing.assert_close(score(4 * x), 4 * score(x), rtol=1e-4, atol=1e-3)
    again = train.train_lowrank(examples, gate, 1.0, 0.95, training)
    assert all(np.array_equal(a, b) for a, b in zip(again, networks, strict=True))


def test_the_biased_form_is_the_folded_one():
    examples, gate = layer()
    network = train._Biased(train._start(train._components(examples, gate, "cpu"), 1.0, 8))
    x = torch.from_numpy(examples.held_inputs.astype(np.float32))
    one = x / network.scale @ network.constant
    assert float(one.mean()) == pytest.approx(1, abs=0.1) and float(one.min()) > 0
    with torch.no_grad():
        expected = network(x).numpy()
    got = scores("lowrank", x.numpy(), network.folded())
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_importance_moves_the_odds():
    examples, gate = layer(unit=True)
    networks = train.train_lowrank(examples, gate, 1.0, 0.95, Training(8, epochs=1, **FAST))
    importance = np.exp(np.random.default_rng(0).standard_normal(D_FF)).astype(np.float32)
    got = train.weighted(networks, examples, importance, 0.95)
    assert np.array_equal(got[0], networks[0])
    x = examples.given(torch.from_numpy(examples.held_inputs.astype(np.float32))).numpy()
    before, after = scores("lowrank", x, networks), scores("lowrank", x, got)
    one = np.maximum(x @ got[0][0], 0)
    moved = (after - before) / one[:, None]
    by = moved - np.log(importance)
    np.testing.assert_allclose(by, np.broadcast_to(by[:1, :1], by.shape), atol=2e-3)
    assert one.mean() == pytest.approx(1, abs=0.1)
    (counts,) = metrics.count(
        lambda x: scorer("lowrank", got)(x) + 1e-4, examples.held_inputs, examples.held_labels, [0.0]
    )
    assert counts.recall == pytest.approx(0.95, abs=0.01)


def test_balanced_networks_are_the_same_function():
    rng = np.random.default_rng(0)
    fc1 = rng.standard_normal((16, D)).astype(np.float32)
    fc2 = (rng.standard_normal((D_FF, 16)) * 10.0 ** np.arange(-8, 8)).astype(np.float32)
    fc2[:, 3] = 0
    again = train.balanced((fc1, fc2))
    x = rng.standard_normal((20, D)).astype(np.float32)
    np.testing.assert_allclose(
        scores("lowrank", x, again), scores("lowrank", x, (fc1, fc2)), rtol=1e-4, atol=10
    )
    size = np.sqrt(np.square(again[1]).mean(0))
    np.testing.assert_allclose(np.delete(size, 3), 1, rtol=1e-5)
    assert not again[1][:, 3].any()


def test_losses_that_are_not_finite_are_told():
    examples, _ = layer()
    inputs = examples.inputs.copy()
    inputs[5, 5] = np.nan
    broken = Examples(inputs, examples.labels, examples.held_inputs, examples.held_labels, D_FF)
    with pytest.raises(ValueError, match="not finite"):
        train.train_published(broken, Training(4, epochs=1, batch=64))
    with pytest.raises(ValueError, match="at least 1"):
        Training(0)
