"""The training loop: a sparse student learns from text and from the original model.

Two ways to sparsity, one loop: the paper's L1 loss with its lambda schedule, or thresholds steered to a
target.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prosparse.sparsify import checkpoint, controller
from prosparse.sparsify.batches import Batch, Mixture
from prosparse.sparsify.controller import TargetControl
from prosparse.sparsify.hf_model import Trunk
from prosparse.sparsify.losses import LossMix, Teacher, head_loss
from prosparse.sparsify.regularizer import Norm, concentration, l1
from prosparse.sparsify.schedule import LambdaSchedule, LearningRate


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run. `schedule` is the paper's path, `control` that of a target; with neither, the activation is
    merely trained with."""

    steps: int
    sequences: int  # a step
    micro_sequences: int  # at a time; a step accumulates over them
    learning_rate: LearningRate
    mix: LossMix = field(default_factory=LossMix)
    schedule: LambdaSchedule | None = None
    l1_norm: Norm = "mean"
    control: TargetControl | None = None
    concentration: float = 0.1  # weight of that regulariser, under control
    matrix_rate: float = 1.0  # matrices multiply the learning rate by it (muP)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the gradients
    document_mask: bool = False  # tokens see only their own document
    bfloat16: bool = False  # products in bfloat16, weights stay float32
    compile: bool = False
    checkpoint_every: int = 200
    max_bad_steps: int = 10  # in a row

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "micro_sequences", "checkpoint_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.sequences % self.micro_sequences:
            raise ValueError(
                f"{self.sequences} sequences a step are not a multiple of {self.micro_sequences} at a time"
            )
        if self.schedule and self.control:
            raise ValueError("give a schedule of lambda or a target, not both")


class Trainer:
    """Trains `student` in place. A run in `folder` goes on from its newest checkpoint.

    `metrics.jsonl` there has a line a step: `step, lr, lambda, loss, next_token, kl, sparsity, wanted,
    grad_norm, tokens, seconds`, `skipped` where the numbers were not finite and the step was not taken.
    """

    def __init__(
        self, student: Trunk, teacher: Trunk | None, mixture: Mixture, config: TrainConfig, folder: Path
    ) -> None:
        if config.mix.distil and teacher is None:
            raise ValueError("distillation needs the original model")
        self.student, self.teacher, self.mixture, self.config = student, teacher, mixture, config
        self.folder = folder
        self.step = 0
        self.bad_steps = 0
        self._layers = len(student.mlps)
        self._thresholds = np.array([float(mlp.threshold) for mlp in student.mlps])
        # while only ReLU acts: the sum of densities by layer, and the number of steps
        self._natural = np.zeros(self._layers + 1)
        parameters = [p for p in student.model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim == 2]
        vectors = [p for p in parameters if p.ndim != 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "scale": config.matrix_rate}, {"params": vectors, "scale": 1.0}],
            lr=1.0,  # set before every step
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=student.head.is_cuda,
        )
        self._parameters = parameters
        student.model.train()
        if teacher is not None:
            teacher.model.eval().requires_grad_(False)
        with_concentration = bool(config.control and config.concentration)
        self._measures = [_Measure(config.l1_norm, with_concentration) for _ in student.mlps]
        for mlp, measure in zip(student.mlps, self._measures, strict=True):
            mlp.observe = measure
        if config.compile:
            # layer by layer: they are alike, so one is compiled instead of thirty
            for layer in (*student.layers, *(teacher.layers if teacher is not None else ())):
                layer.compile()
        self._resume()

    @property
    def device(self) -> torch.device:
        return self.student.head.device

    def run(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> None:
        """All steps that are left; `on_step` gets each one's metrics once they are on disk."""
        with (self.folder / "metrics.jsonl").open("a") as log:
            while self.step < self.config.steps:
                metrics = self._one_step()
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                if on_step:
                    on_step(metrics)
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self._save()

    def _one_step(self) -> dict[str, Any]:
        config, start = self.config, time.perf_counter()
        self.step += 1
        step = self.step
        rate = config.learning_rate.at(step)
        factor = config.schedule.at(step) if config.schedule else 0.0
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        totals = torch.zeros(3, device=self.device)
        zeros = torch.zeros(self._layers, device=self.device)
        parts = config.sequences // config.micro_sequences
        for part in range(parts):
            first = (step - 1) * config.sequences + part * config.micro_sequences
            losses, sparsity = self._backward(
                self.mixture.batch(first, config.micro_sequences), factor, parts
            )
            totals += losses / parts
            zeros += sparsity / parts
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, config.clip)
        loss, next_token, kl = totals.tolist()
        taken = math.isfinite(loss) and math.isfinite(float(norm))
        if taken:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._count_bad(taken, loss)
        layers = zeros.cpu().numpy().astype(np.float64)
        wanted = self._steer(1 - layers) if taken else None
        return {
            "step": step,
            "lr": rate,
            "lambda": factor,
            "loss": loss,
            "next_token": next_token,
            "kl": kl,
            "sparsity": float(layers.mean()),
            "wanted": wanted,
            "grad_norm": float(norm),
            "tokens": step * config.sequences * self.mixture.context,
            "seconds": time.perf_counter() - start,
        } | ({} if taken else {"skipped": True})

    def _backward(self, batch: Batch, factor: float, parts: int) -> tuple[Tensor, Tensor]:
        """Adds one micro-batch's share of the gradients. (loss, next-token, KL) and sparsity by layer."""
        config = self.config
        tokens = torch.from_numpy(batch.tokens).to(self.device, non_blocking=True)
        learn = torch.from_numpy(batch.loss[:, 1:]).to(self.device).reshape(-1)
        document = torch.from_numpy(batch.document[:, :-1]).to(self.device) if config.document_mask else None
        inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bfloat16):
            theirs = None
            if self.teacher is not None and config.mix.distil:
                with torch.no_grad():
                    theirs = Teacher(self.teacher.hidden(inputs, document).flatten(0, 1), self.teacher.head)
            hidden = self.student.hidden(inputs, document).flatten(0, 1)
            loss, next_token, kl = head_loss(
                hidden, self.student.head, targets, learn, config.mix, theirs, compiled=config.compile
            )
        measured = self._measures
        if factor:
            loss = loss + factor * torch.stack([m.l1 for m in measured]).sum()
        if config.control and config.concentration:
            loss = loss + config.concentration * torch.stack([m.concentration for m in measured]).mean()
        (loss / parts).backward()
        sparsity = torch.stack([m.sparsity for m in measured])
        return torch.stack([loss.detach(), next_token, kl]), sparsity

    def _steer(self, densities: np.ndarray) -> float | None:
        """Moves the thresholds after a step; the overall sparsity that was wanted."""
        control = self.config.control
        if control is None:
            return None
        progress = self.step / self.config.steps
        if progress <= control.start or not self._natural[-1]:
            self._natural += np.append(densities, 1.0)
            return None
        natural = self._natural[:-1] / self._natural[-1]
        wanted = control.wanted(1 - float(natural.mean()), progress)
        targets = controller.layer_densities(natural, 1 - wanted)
        self._thresholds = controller.step(self._thresholds, densities, targets, control.gain)
        for mlp, threshold in zip(self.student.mlps, self._thresholds, strict=True):
            mlp.threshold.fill_(threshold)
        return wanted

    def _count_bad(self, taken: bool, loss: float) -> None:
        self.bad_steps = 0 if taken else self.bad_steps + 1
        if self.bad_steps >= self.config.max_bad_steps:
            raise ValueError(
                f"{self.bad_steps} steps in a row gave a loss of {loss} or gradients that are not finite: "
                "lower the learning rate or lambda; the last checkpoint is sound"
            )

    def _save(self) -> None:
        state = {
            "model": self.student.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "thresholds": torch.from_numpy(self._thresholds),
            "natural": torch.from_numpy(self._natural),
            "bad_steps": self.bad_steps,
        }
        checkpoint.save(self.folder / "checkpoints", self.step, state)

    def _resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.load_latest(self.folder / "checkpoints", self.device)
        if found is not None:
            self.step, state = found
            self.student.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._thresholds = state["thresholds"].cpu().numpy()
            self._natural = state["natural"].cpu().numpy()
            self.bad_steps = state["bad_steps"]
            for mlp, threshold in zip(self.student.mlps, self._thresholds, strict=True):
                mlp.threshold.fill_(threshold)
        _forget_after(self.folder / "metrics.jsonl", self.step)


class _Measure:
    """What one MLP's x1 is asked for, kept until the backward pass has used it."""

    def __init__(self, norm: Norm, with_concentration: bool) -> None:
        self._norm, self._with_concentration = norm, with_concentration
        self.l1 = self.concentration = self.sparsity = torch.zeros(())

    def __call__(self, x1: Tensor) -> None:
        self.l1 = l1(x1, self._norm)
        self.sparsity = (x1.detach() == 0).float().mean()
        if self._with_concentration:
            self.concentration = concentration(x1)


def _forget_after(log: Path, step: int) -> None:
    """Drops the lines of steps that will be done again, and one that was cut off."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break
    part = log.with_suffix(".part")
    part.write_text("".join(kept))
    part.replace(log)
