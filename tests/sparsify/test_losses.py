"""The chunked losses and their gradients against plain autograd."""

import math

import pytest

torch = pytest.importorskip("torch")
from prosparse.sparsify import losses  # noqa: E402

LossMix, Teacher = losses.LossMix, losses.Teacher

N, D, V = 37, 24, 101


@pytest.fixture
def batch():
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    teacher = Teacher(torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64))
    return hidden, head, torch.randint(V, (N,)), torch.rand(N) < 0.7, teacher


def plain(hidden, head, targets, learn, mix, teacher):
    logits, t = (hidden @ head.T)[learn], mix.temperature
    next_token = torch.nn.functional.cross_entropy(logits, targets[learn])
    theirs, places = (teacher.hidden @ teacher.head.T)[learn].topk(mix.top_k or V)
    kl = torch.nn.functional.kl_div(
        torch.log_softmax(logits / t, -1).gather(1, places),
        torch.log_softmax(theirs / t, -1),
        log_target=True,
        reduction="batchmean",
    )
    return mix.next_token * next_token + mix.distil * t**2 * kl, next_token, kl * t**2


@pytest.mark.parametrize("chunk", [1, 8, 37, 4096])
@pytest.mark.parametrize(
    "mix",
    [LossMix(), LossMix(1.0, 0.0), LossMix(0.3, 0.7, 2.0), LossMix(0.0, 2.0, 0.5), LossMix(0.2, 1.0, 1.5, 7)],
)
def test_against_autograd(batch, mix, chunk):
    hidden, head, *_ = batch
    want = plain(*batch[:4], mix, batch[4])
    want[0].backward()
    gradients = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    got = losses.head_loss(*batch[:4], mix, batch[4], chunk)
    (got[0] * 3).backward()
    for ours, theirs in zip(got, want, strict=True):
        if theirs is not want[2] or mix.distil:
            assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for ours, theirs in zip((hidden.grad, head.grad), gradients, strict=True):
        torch.testing.assert_close(ours, 3 * theirs, rtol=1e-4, atol=1e-6)


def test_a_perfect_student_has_nothing_to_learn(batch):
    hidden, head, targets, learn, _ = batch
    teacher = Teacher(hidden.detach(), head.detach())
    loss, _, kl = losses.head_loss(hidden, head, targets, learn, LossMix(), teacher)
    loss.backward()
    assert kl.item() == pytest.approx(0, abs=1e-6)
    assert hidden.grad.abs().max() < 1e-6


def test_frozen_heads_and_tokens_not_learnt_get_no_gradient(batch):
    hidden, head, targets, learn, teacher = batch
    loss, *_ = losses.head_loss(hidden, head.detach(), targets, learn, LossMix(), teacher)
    loss.backward()
    assert head.grad is None
    assert (hidden.grad[~learn] == 0).all()


def test_a_batch_of_prompts_only_teaches_nothing(batch):
    hidden, head, targets, learn, teacher = batch
    loss, next_token, kl = losses.head_loss(hidden, head, targets, learn & False, LossMix(), teacher)
    loss.backward()
    assert loss.item() == next_token.item() == kl.item() == 0
    assert (hidden.grad == 0).all()
    assert (head.grad == 0).all()


def test_bad_calls(batch):
    hidden, head, targets, learn, _ = batch
    with pytest.raises(ValueError, match="needs a teacher"):
        losses.head_loss(hidden, head, targets, learn, LossMix())
    for arguments in [(0.0, 0.0), (-1.0, 1.0), (0.0, 1.0, 0.0)]:
        with pytest.raises(ValueError, match="must"):
            LossMix(*arguments)


def test_states_loss():
    """Relative to each token's length, so that a few long ones do not hide all others."""
    generator = torch.Generator().manual_seed(3)
    theirs = [torch.randn(2, 5, 7, generator=generator) for _ in range(3)]
    theirs[0][0, 0] *= 1000
    ours = [(t + 0.1 * torch.randn(t.shape, generator=generator)).requires_grad_() for t in theirs]
    got = losses.states_loss(ours, theirs)
    tokens = [
        float(((a - b) ** 2).sum() / (b**2).sum())
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one.detach().reshape(-1, 7), other.reshape(-1, 7), strict=True)
    ]
    assert float(got.detach()) == pytest.approx(sum(tokens) / len(tokens))
    got.backward()
    assert all(bool((o.grad != 0).all()) for o in ours)
    assert float(losses.states_loss(theirs, theirs)) == 0
    nothing = [torch.zeros(1, 2, 7)]
    assert math.isfinite(float(losses.states_loss(nothing, nothing)))
