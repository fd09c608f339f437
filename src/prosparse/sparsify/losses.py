"""Next-token loss and distillation over a large vocabulary, whose logits are never in memory at once.

Gradients are formed together with the losses, chunk by chunk of tokens, so nothing is computed twice: one
product for the logits, one for each of the two gradients, and one for the teacher's logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12
_NEVER = -1e30  # a logit: its probability is 0, and 0 times its logarithm is 0, not NaN
CHUNK = 4096  # tokens; with a vocabulary of 50,000 a chunk's float32 logits take 0.8 GB


@dataclass(frozen=True, slots=True)
class LossMix:
    """Weights of the losses. Distillation is T^2 KL(teacher || student) of logits over temperature T
    (Hinton et al. 2015): its gradient then does not fade as T grows. With `top_k` the teacher's distribution
    is that of its top_k likeliest tokens alone. `states` is that of `states_loss`."""

    next_token: float = 0.0
    distil: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    states: float = 0.0

    def __post_init__(self) -> None:
        if min(self.next_token, self.distil, self.states) < 0 or self.next_token + self.distil == 0:
            raise ValueError("loss weights must not be negative, nor those of next token and KL both 0")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be positive, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be at least 1, not {self.top_k}")

    @property
    def taught(self) -> bool:
        """Whether the original is needed."""
        return self.distil > 0 or self.states > 0


@dataclass(frozen=True, slots=True)
class Teacher:
    """The original model's hidden states [n, d] in front of its head [vocab, d], and those after each of its
    layers [batch, n, d] where they are compared."""

    hidden: Tensor
    head: Tensor
    states: Sequence[Tensor] = ()


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


def states_loss(states: Sequence[Tensor], theirs: Sequence[Tensor], compiled: bool = False) -> Tensor:
    """How far hidden states [..., d] are from the teacher's, a float32 scalar: |difference|^2 / |theirs|^2 of
    every token, averaged over tokens and layers. Relative, as a few tokens have states a thousand times as
    long as all others (Sun et al. 2024, massive activations)."""
    error = _compiled_error() if compiled else _relative_error
    return torch.stack([error(ours, other) for ours, other in zip(states, theirs, strict=True)]).mean()


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    theirs = theirs.float()
    difference = (ours.float() - theirs).square().sum(-1)
    return (difference / theirs.square().sum(-1).clamp(min=_TINY)).mean()


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
        # products are as narrow as autocast wants them; inputs are narrowed once, not once a chunk
        kind = hidden.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        inputs, matrix = hidden.to(narrow), head.to(narrow)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        share = learn.float() / learn.sum().clamp(min=1)
        totals = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            h = inputs[part]
            theirs = teacher.hidden[part] @ teacher.head.T if teacher is not None and mix.distil else None
            losses, gradient = losses_of(h @ matrix.T, theirs, targets[part], share[part], mix)
            totals += losses
            if d_hidden is not None:
                d_hidden[part] = gradient @ matrix
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
    mix: LossMix,
) -> tuple[Tensor, Tensor]:
    """float32 [2]: weighted sums of the next-token loss and of KL; and d(loss)/d(logits) [n, vocab]."""
    dtype, logits = logits.dtype, logits.float()
    log_q = F.log_softmax(logits, -1)
    next_token = -(log_q.gather(-1, targets[:, None])[:, 0] * share).sum()
    kl = torch.zeros((), device=logits.device)
    gradient = torch.zeros_like(logits)
    if mix.next_token:
        wanted = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
        gradient = mix.next_token * (log_q.exp() - wanted.float())
    if theirs is not None:
        t, theirs = mix.temperature, theirs.float()
        if mix.top_k is not None and mix.top_k < theirs.shape[-1]:
            least = theirs.topk(mix.top_k, -1).values[:, -1:]
            theirs = theirs.where(theirs >= least, _NEVER)
        if t != 1:
            log_q = F.log_softmax(logits / t, -1)
        log_p = F.log_softmax(theirs / t, -1)
        p = log_p.exp()
        kl = ((p * (log_p - log_q)).sum(-1) * share).sum() * t**2
        gradient = gradient + mix.distil * t * (log_q.exp() - p)
    return torch.stack([next_token, kl]), (gradient * share[:, None]).to(dtype)


@cache
def _compiled_losses() -> Callable[..., tuple[Tensor, Tensor]]:
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_losses, dynamic=False)
    return compiled


@cache
def _compiled_error() -> Callable[[Tensor, Tensor], Tensor]:
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(_relative_error, dynamic=False)
    return compiled
