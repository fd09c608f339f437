"""Next-token loss and distillation over a large vocabulary, whose logits are never in memory at once.

Gradients are formed together with the losses, chunk by chunk of tokens, so nothing is computed twice: one
product for the logits, one for each of the two gradients, and one for the teacher's logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096  # tokens; with a vocabulary of 50,000 a chunk's float32 logits take 0.8 GB


@dataclass(frozen=True, slots=True)
class LossMix:
    """Weights of the two losses. Distillation is T^2 KL(teacher || student) of logits over temperature T
    (Hinton et al. 2015): its gradient then does not fade as T grows."""

    next_token: float = 0.0
    distil: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.next_token < 0 or self.distil < 0 or self.next_token + self.distil == 0:
            raise ValueError("loss weights must not be negative, nor both 0")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be positive, not {self.temperature}")


@dataclass(frozen=True, slots=True)
class Teacher:
    """The original model's hidden states [n, d] in front of its head [vocab, d]."""

    hidden: Tensor
    head: Tensor


def head_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    learn: Tensor,
    mix: LossMix,
    teacher: Teacher | None = None,
    chunk: int = CHUNK,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss with gradients, next-token loss, KL): means in nats over the tokens where `learn`, 0 without any.

    `hidden` [n, d] is what the head [vocab, d] multiplies; `targets` int64 [n]; `learn` bool [n].
    """
    if mix.distil and teacher is None:
        raise ValueError("distillation needs a teacher")
    losses = _compiled_losses() if compiled else _losses
    result: tuple[Tensor, Tensor, Tensor] = _HeadLoss.apply(
        hidden, head, targets, learn, mix, teacher, chunk, losses
    )
    return result


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        learn: Tensor,
        mix: LossMix,
        teacher: Teacher | None,
        chunk: int,
        losses_of: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        share = learn.float() / learn.sum().clamp(min=1)
        totals = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            h = hidden[part]
            theirs = teacher.hidden[part] @ teacher.head.T if teacher is not None and mix.distil else None
            losses, gradient = losses_of(
                h @ head.T, theirs, targets[part], share[part], mix.next_token, mix.distil, mix.temperature
            )
            totals += losses
            gradient = gradient.to(h.dtype)  # products under autocast may be narrower than h
            if d_hidden is not None:
                d_hidden[part] = gradient @ head
            if d_head is not None:
                d_head += gradient.T @ h
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        next_token, kl = totals
        loss = mix.next_token * next_token + mix.distil * kl
        ctx.mark_non_differentiable(next_token, kl)
        return loss, next_token, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors]
        return (*gradients, *[None] * 6)


def _losses(
    logits: Tensor,
    theirs: Tensor | None,
    targets: Tensor,
    share: Tensor,
    next_token_weight: float,
    distil: float,
    t: float,
) -> tuple[Tensor, Tensor]:
    """float32 [2]: weighted sums of the next-token loss and of KL; and d(loss)/d(logits) [n, vocab]."""
    dtype, logits = logits.dtype, logits.float()
    log_q = F.log_softmax(logits, -1)
    next_token = -(log_q.gather(-1, targets[:, None])[:, 0] * share).sum()
    kl = torch.zeros((), device=logits.device)
    gradient = torch.zeros_like(logits)
    if next_token_weight:
        wanted = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
        gradient = next_token_weight * (log_q.exp() - wanted.float())
    if theirs is not None:
        if t != 1:
            log_q = F.log_softmax(logits / t, -1)
        log_p = F.log_softmax(theirs.float() / t, -1)
        p = log_p.exp()
        kl = ((p * (log_p - log_q)).sum(-1) * share).sum() * t**2
        gradient = gradient + distil * t * (log_q.exp() - p)
    return torch.stack([next_token, kl]), (gradient * share[:, None]).to(dtype)


@cache
def _compiled_losses() -> Callable[..., tuple[Tensor, Tensor]]:
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_losses, dynamic=False)
    return compiled
