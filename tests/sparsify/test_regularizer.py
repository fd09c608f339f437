"""The L1 loss and the sparsity counter against their formulas written out."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from prosparse.sparsify import regularizer  # noqa: E402


@pytest.mark.parametrize("norm", ["mean", "sum1e-8"])
def test_l1_and_its_gradients(norm):
    """Through x1 = relu(g) * u into gate and up, against the signs worked out by hand."""
    rng = np.random.default_rng(0)
    gate, up = (torch.tensor(rng.standard_normal((3, 5, 7)), requires_grad=True) for _ in range(2))
    loss = regularizer.l1(torch.relu(gate) * up, norm)
    loss.backward()
    g, u = gate.detach().numpy(), up.detach().numpy()
    x1 = np.maximum(g, 0) * u
    factor = 1 / x1.size if norm == "mean" else 1e-8
    assert loss.item() == pytest.approx(np.abs(x1).sum() * factor, rel=1e-6)
    active = g > 0
    np.testing.assert_allclose(gate.grad.numpy(), active * np.abs(u) * factor, rtol=1e-6)
    np.testing.assert_allclose(up.grad.numpy(), active * g * np.sign(u) * factor, rtol=1e-6)


def test_the_norms_meet_at_a_hundred_million_elements():
    x1 = torch.ones(10, 100)
    ratio = regularizer.l1(x1, "sum1e-8") / regularizer.l1(x1, "mean")
    assert ratio.item() == pytest.approx(x1.numel() * 1e-8)


def test_low_precision_is_summed_in_float32():
    x1 = torch.full((4096, 512), 1e-3, dtype=torch.bfloat16)
    assert regularizer.l1(x1).dtype == torch.float32
    assert regularizer.l1(x1, "sum1e-8").item() == pytest.approx(
        x1[0, 0].item() * x1.numel() * 1e-8, rel=1e-4
    )


def test_unknown_norm():
    with pytest.raises(ValueError, match="mean or sum1e-8"):
        regularizer.l1(torch.ones(1), "l2")


def test_concentration():
    one_hot, flat = torch.zeros(2, 64), torch.full((2, 64), -0.3)
    one_hot[:, 5] = 7.0
    assert regularizer.concentration(one_hot).item() == pytest.approx(1 / 8, rel=1e-5)
    assert regularizer.concentration(flat).item() == pytest.approx(1.0, rel=1e-5)
    # scale does not matter, and a token without active neurons gives no NaN
    x = torch.randn(6, 33)
    scaled = regularizer.concentration(x * 100).item()
    assert scaled == pytest.approx(regularizer.concentration(x).item(), rel=1e-4)
    empty = torch.zeros(1, 8, requires_grad=True)
    regularizer.concentration(empty).backward()
    assert torch.isfinite(empty.grad).all()


def test_sparsity_counter():
    rng = np.random.default_rng(1)
    counter = regularizer.SparsityCounter(3)
    batches = [
        [np.maximum(rng.standard_normal((b, 11, 13)) - shift, 0) for shift in (0, 1, 2)] for b in (1, 4)
    ]
    for batch in batches:
        for layer, x1 in enumerate(batch):
            counter.add(layer, torch.from_numpy(x1))
    for layer in range(3):
        values = np.concatenate([batch[layer].ravel() for batch in batches])
        assert counter.per_layer()[layer].item() == np.mean(values == 0)
    everything = np.concatenate([x1.ravel() for batch in batches for x1 in batch])
    assert counter.overall() == pytest.approx(np.mean(everything == 0), abs=1e-15)
    counter.reset()
    with pytest.raises(ValueError, match="no activations"):
        counter.overall()
