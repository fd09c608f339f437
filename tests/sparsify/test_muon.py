"""Muon against torch's own, and what it makes of a matrix."""

import pytest

torch = pytest.importorskip("torch")
from prosparse.sparsify import muon  # noqa: E402

SHAPES = [(24, 40), (40, 24), (24, 40), (17, 17), (1, 9), (40, 24)]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_it_is_torchs():
    ours, theirs = parameters(), parameters()
    fast = muon.Muon(ours, lr=0.02)
    plain = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        if step == 1:
            ours[3].grad = theirs[3].grad = None
        fast.step()
        plain.step()
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        moved = (b - start).norm()
        assert moved > 0
        # products are bfloat16 in both
        assert (a - b).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", [(2, 30, 50), (1, 50, 30), (3, 1, 8)])
def test_singular_values_are_evened_out(shape):
    generator = torch.Generator().manual_seed(2)
    matrices = torch.randn(shape, generator=generator)
    found = muon.orthogonal(matrices)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    exact = u @ v
    cosine = (found * exact).sum() / (found.norm() * exact.norm())
    assert cosine > 0.97
    assert not muon.orthogonal(torch.zeros(1, 3, 4)).any()


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="matrices"):
        muon.Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
