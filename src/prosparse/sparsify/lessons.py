"""What micro-batches teach: the original's pass over each, the student's, and gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prosparse.sparsify.batches import Batch
from prosparse.sparsify.config import TrainConfig
from prosparse.sparsify.distributed import World
from prosparse.sparsify.gpu import Replayed, sent
from prosparse.sparsify.hf_model import Trunk
from prosparse.sparsify.losses import Teacher, head_loss, states_loss
from prosparse.sparsify.regularizer import Norm, concentration, l1


@dataclass(frozen=True, slots=True)
class Lesson:
    """Tokens int64 [sequences, context], what follows each of them [sequences * context], whether it is to be
    learnt, the document it is in, and what the original makes of it."""

    inputs: Tensor
    targets: Tensor
    learn: Tensor
    document: Tensor | None = None
    theirs: Teacher | None = None


class Lessons:
    """Of `student` by `teacher`. Both passes are replayed as CUDA graphs where they can be: then a lesson is
    good until the next one is made, and gradients are tensors that stay."""

    def __init__(self, student: Trunk, teacher: Trunk | None, config: TrainConfig, world: World) -> None:
        self._student, self._teacher, self._config = student, teacher, config
        self._device = student.head.device
        norm = config.l1_norm if config.schedule else None
        with_concentration = bool(config.control and config.concentration)
        every = 2 if config.noise else 1
        self._measures = [_Measure(norm, with_concentration, every) for _ in student.mlps]
        for mlp, measure in zip(student.mlps, self._measures, strict=True):
            mlp.observe = measure
        self.recorded = _can_be_recorded(config, world, self._device)
        self._replayed_teacher = Replayed(self._their_hidden)
        self._replayed_gradients = Replayed(self._recorded_gradients, self.forget)

    def of(self, batch: Batch) -> Lesson:
        """A batch on the device, with what the original makes of it."""
        tokens = sent(batch.tokens, self._device)
        learn = sent(batch.loss[:, 1:], self._device).reshape(-1)
        document = None
        if self._config.document_mask:
            document = sent(batch.document[:, :-1], self._device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        if not self._config.mix.taught:
            return Lesson(inputs, targets, learn, document)
        # documents need masks, of which no graph is recorded
        hidden = self._replayed_teacher(inputs) if self.recorded else self._their_hidden(inputs, document)
        return Lesson(inputs, targets, learn, document, self._as_teacher(hidden))

    def learn(self, lesson: Lesson, factor: float, share: float) -> Tensor:
        """Adds `share` of one micro-batch's gradients. `factor` is lambda, of L1.

        Returns [loss, next-token loss, KL, states loss, sparsity by layer], to be read before the next call.
        """
        numbers = [torch.full((), number, device=self._device) for number in (factor, share)]
        if not self.recorded:
            return self._gradients(lesson, *numbers)
        assert lesson.theirs is not None
        return self._replayed_gradients(
            lesson.inputs, lesson.targets, lesson.learn, lesson.theirs.hidden, *numbers
        )

    def forget(self) -> None:
        """Gradients are nothing, or zeros where a graph adds to them."""
        if self.recorded:
            gradients = [p.grad for p in self._student.parameters() if p.grad is not None]
            torch._foreach_zero_(gradients)
        else:
            for parameter in self._student.parameters():
                parameter.grad = None

    def _their_hidden(self, inputs: Tensor, document: Tensor | None = None) -> Tensor:
        """What the original's head multiplies, [tokens, d]."""
        assert self._teacher is not None
        with torch.no_grad(), self._narrow():
            hidden: Tensor = self._teacher(inputs, document)
            return hidden.flatten(0, 1)

    def _as_teacher(self, hidden: Tensor) -> Teacher:
        assert self._teacher is not None
        states = self._teacher.states() if self._config.mix.states else ()
        return Teacher(hidden, self._teacher.head, states)

    def _recorded_gradients(
        self, inputs: Tensor, targets: Tensor, learn: Tensor, hidden: Tensor, factor: Tensor, share: Tensor
    ) -> Tensor:
        lesson = Lesson(inputs, targets, learn, theirs=self._as_teacher(hidden))
        return self._gradients(lesson, factor, share)

    def _gradients(self, lesson: Lesson, factor: Tensor, share: Tensor) -> Tensor:
        config, measures = self._config, self._measures

        def losses(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return head_loss(
                hidden.flatten(0, 1),
                head,
                lesson.targets,
                lesson.learn,
                config.mix,
                lesson.theirs,
                compiled=config.compile,
            )

        with self._narrow():
            loss, next_token, kl = self._student(lesson.inputs, lesson.document, losses)
        states = torch.zeros((), device=self._device)
        if config.mix.states:
            assert lesson.theirs is not None
            states = states_loss(self._student.states(), lesson.theirs.states, config.compile)
            loss = loss + config.mix.states * states
        if config.schedule:
            loss = loss + factor * torch.stack([measure.l1 for measure in measures]).sum()
        if config.control and config.concentration:
            spread = torch.stack([measure.concentration for measure in measures]).mean()
            loss = loss + config.concentration * spread
        # before the backward pass, which may compute activations anew
        sparsity = torch.stack([measure.sparsity for measure in measures])
        (loss * share).backward()
        return torch.cat([torch.stack([loss.detach(), next_token, kl, states.detach()]), sparsity])

    def _narrow(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.bfloat16)


def _can_be_recorded(config: TrainConfig, world: World, device: torch.device) -> bool:
    """Whether every micro-batch is learnt by the same kernels, which wait for nothing."""
    plain = config.mix.distil > 0 and not (config.mix.states or config.document_mask or config.recompute)
    return plain and config.compile and device.type == "cuda" and not world.sharded


class _Measure:
    """What one MLP's x1 is asked for, kept until the backward pass has used it. `norm`: of L1, if it is;
    sparsity is that of `every` so many-th sequence."""

    def __init__(self, norm: Norm | None, with_concentration: bool, every: int) -> None:
        self._norm, self._with_concentration, self._every = norm, with_concentration, every
        self.l1 = self.concentration = self.sparsity = torch.zeros(())

    def __call__(self, x1: Tensor) -> None:
        if self._norm:
            self.l1 = l1(x1, self._norm)
        self.sparsity = (x1.detach()[:: self._every] == 0).float().mean()
        if self._with_concentration:
            self.concentration = concentration(x1)
