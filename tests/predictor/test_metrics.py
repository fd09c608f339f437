"""Recall, predicted sparsity and thresholds against brute force over numpy arrays."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from prosparse.predictor import metrics  # noqa: E402
from prosparse.predictor.collect import pack, unpack  # noqa: E402

D, D_FF = 24, 43  # not a whole number of bytes
RECALLS = (0.1, 0.5, 0.9, 0.95, 0.97, 0.99, 0.995, 1.0)


def made(n: int, seed: int = 0, density: float = 0.2, levels: int | None = None):
    """Inputs, a score of them, its values, and an active set that follows it loosely."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((n, D)).astype(np.float16)
    weight = rng.standard_normal((D_FF, D)).astype(np.float32)
    if levels:
        inputs = np.sign(inputs)
        weight = np.sign(weight)

    def score(x):
        return x @ torch.from_numpy(weight).T

    values = score(torch.from_numpy(inputs.astype(np.float32))).numpy()
    noisy = values + 2 * rng.standard_normal(values.shape)
    return inputs, score, values, noisy > np.quantile(noisy, 1 - density)


@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("levels", [None, 2])
def test_thresholds_are_the_largest_that_reach_the_recall(n, levels):
    inputs, score, values, active = made(n, n, levels=levels)
    got = metrics.calibrate(score, inputs, pack(active), RECALLS)
    assert list(got) == sorted(got, reverse=True)
    for recall, threshold in zip(RECALLS, got, strict=True):
        assert np.float32(threshold) == threshold
        assert (values[active] >= np.float32(threshold)).mean() >= recall
        # every greater threshold is as good as the next greater score of an active neuron
        above = values[active][values[active] > np.float32(threshold)]
        if len(above):
            assert (values[active] >= above.min()).mean() < recall
        assert (values[active] >= np.nextafter(np.float32(threshold), np.float32(np.inf))).mean() < recall


def test_counts_are_those_of_every_element(monkeypatch):
    inputs, score, values, active = made(101)
    thresholds = [-3.0, 0.0, 2.5, 100.0]
    whole = metrics.count(score, inputs, pack(active), thresholds)
    monkeypatch.setattr(metrics, "_CHUNK", 1000)  # many chunks, the last not full
    assert metrics.count(score, inputs, pack(active), thresholds) == whole
    assert metrics.calibrate(score, inputs, pack(active), [0.9]) == pytest.approx(
        [np.sort(values[active])[::-1][int(np.ceil(0.9 * active.sum())) - 1]], abs=1e-5
    )
    for counts, threshold in zip(whole, thresholds, strict=True):
        named = values >= threshold
        tokens = len(inputs)
        # the published formulas: (mean |y| - mean missed) / mean |y|, and 1 - mean(#predicted) / d_ff
        y, missed = active.sum(1), (active & ~named).sum(1)
        assert counts.recall == pytest.approx((y.mean() - missed.mean()) / y.mean())
        assert counts.predicted_sparsity == pytest.approx(1 - named.sum(1).mean() / D_FF)
        assert counts.sparsity == pytest.approx(1 - active.mean())
        assert counts.elements == tokens * D_FF


@pytest.mark.parametrize("recall", [0.07, 0.29, 0.57, 0.97, 1.0])
def test_shares_that_floats_round(recall):
    for n in range(1, 400):
        k = metrics._needed(recall, n)
        assert k / n >= recall or k == n
        assert k == 1 or (k - 1) / n < recall


def test_a_layer_without_active_neurons_has_no_candidates():
    inputs, score, values, active = made(20)
    none = np.zeros_like(active)
    at = metrics.calibrate(score, inputs, pack(none), [0.9, 0.99])
    assert len(set(at)) == 1 and at[0] > values.max()
    (counts,) = metrics.count(score, inputs, pack(none), [at[0]])
    assert (counts.recall, counts.predicted_sparsity, counts.sparsity) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_told(value):
    inputs, score, _, active = made(20)

    def broken(x):
        scores = score(x)
        scores[-1, -1] = value
        return scores

    for call in (metrics.calibrate, metrics.count):
        with pytest.raises(ValueError, match="not finite"):
            call(broken, inputs, pack(active), [0.9])
    with pytest.raises(ValueError, match="needed"):
        metrics.count(score, inputs[:0], pack(active[:0]), [0.0])
    with pytest.raises(ValueError, match="one of each"):
        metrics.count(score, inputs[:3], pack(active), [0.0])


@pytest.mark.parametrize("d_ff", [1, 8, 43, 160])
def test_packed_bits(d_ff):
    active = np.random.default_rng(d_ff).random((9, d_ff)) < 0.3
    bits = pack(active)
    assert bits.shape == (9, -(-d_ff // 8))
    assert np.array_equal(unpack(bits, d_ff), active)
    for token, neuron in np.argwhere(active):
        assert bits[token, neuron // 8] >> (neuron % 8) & 1
