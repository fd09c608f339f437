"""The training loop: a sparse student learns from text and from the original model.

Two ways to sparsity, one loop: the paper's L1 loss with its lambda schedule, or thresholds steered to a
target.
"""

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prosparse.model.adapter import ATTENTION
from prosparse.sparsify import checkpoint, controller
from prosparse.sparsify.batches import Batch, Mixture, ahead
from prosparse.sparsify.budget import Budget
from prosparse.sparsify.config import TrainConfig
from prosparse.sparsify.distributed import World, full, shard
from prosparse.sparsify.gpu import Numbers
from prosparse.sparsify.hf_model import Trunk
from prosparse.sparsify.lessons import Lesson, Lessons
from prosparse.sparsify.muon import Muon
from prosparse.sparsify.pull import Pull


@dataclass(frozen=True, slots=True)
class Feed:
    """What is read up to and including step `until`: `sequences` a step out of `mixture`."""

    mixture: Mixture
    sequences: int
    until: int


class Trainer:
    """Trains `student` in place. A run in `folder` goes on from its newest checkpoint.

    `metrics.jsonl` there has a line a step: `step, lr, lambda, loss, next_token, kl, states, sparsity,
    wanted, grad_norm, tokens, seconds`, `size` in bytes under a `budget`, `skipped` where numbers were not
    finite and the step was not taken.
    In a `world` of several processes each one must make and run a trainer.
    """

    def __init__(
        self,
        student: Trunk,
        teacher: Trunk | None,
        feeds: Sequence[Feed],
        config: TrainConfig,
        folder: Path,
        world: World | None = None,
        budget: Budget | None = None,
    ) -> None:
        if config.mix.taught and teacher is None:
            raise ValueError("distillation needs the original model")
        self.student, self.teacher, self.feeds, self.config = student, teacher, feeds, config
        self.folder, self.world, self.budget = folder, world or World(), budget
        self._check_feeds()
        self.device = student.head.device
        self.step = 0
        self.bad_steps = 0
        self._lesson: Lesson | None = None  # of the next step
        self._layers = len(student.mlps)
        self._thresholds = np.array([float(mlp.threshold) for mlp in student.mlps])
        # while only ReLU acts: the sum of densities by layer, and the number of steps
        self._natural = np.zeros(self._layers + 1)
        self._prepare()
        self._lessons = Lessons(student, teacher, config, self.world)
        self._trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._optimizers = self._new_optimizers()
        self._pull = None
        if config.pull or budget:
            self._pull = Pull(student, teacher, self._scale)
        self._resume()

    def run(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> None:
        """All steps that are left; `on_step` gets each one's metrics once they are on disk."""
        batches = ahead(self._micro_batches(self.step + 1))
        with contextlib.ExitStack() as stack:
            stack.callback(batches.close)
            log = None
            if self.world.is_main:
                log = stack.enter_context((self.folder / "metrics.jsonl").open("a"))
            while self.step < self.config.steps:
                metrics = self._one_step(batches)
                if log is not None:
                    log.write(json.dumps(metrics) + "\n")
                    log.flush()
                if on_step:
                    on_step(metrics)
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    checkpoint.save(self.folder / "checkpoints", self.step, self._state(), self.world)

    def _check_feeds(self) -> None:
        parts = self.config.micro_sequences * self.world.size
        ends = [feed.until for feed in self.feeds]
        if not ends or ends != sorted(set(ends)) or ends[-1] < self.config.steps:
            raise ValueError(f"the data's last steps {ends} must rise to the last of {self.config.steps}")
        for feed in self.feeds:
            if feed.mixture.noise != self.config.noise:
                raise ValueError(f"the data has noise {feed.mixture.noise}, the run {self.config.noise}")
            if feed.sequences % parts:
                raise ValueError(
                    f"{feed.sequences} sequences a step are not a multiple of {self.config.micro_sequences} "
                    f"at a time on {self.world.size} processes"
                )

    def _prepare(self) -> None:
        """Compiles and spreads both models, as the configuration and the world want it."""
        config = self.config
        self.student.train()
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
        for trunk in (self.student, self.teacher):
            if trunk is not None and config.mix.states:
                trunk.watch()
            if trunk is not None and config.compile:
                trunk.compile()
            if trunk is self.student and config.recompute:
                trunk.recompute()
            if trunk is not None and self.world.sharded:
                shard(trunk, config.bfloat16)

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        config, trained = self.config, list(self._trained.values())
        # rows of the embedding and the head are words, not directions: AdamW's
        muon = self.student.matrices() if config.optimizer == "muon" else {}
        others = {name: p for name, p in self._trained.items() if name not in muon}
        optimizers: list[torch.optim.Optimizer] = []
        if muon:
            optimizers.append(Muon(self._groups(muon), lr=0.0, world=self.world))
        optimizers.append(
            torch.optim.AdamW(
                self._groups(others),
                lr=0.0,  # set before every step
                betas=config.betas,
                weight_decay=config.weight_decay,
                fused=self.device.type == "cuda",
            )
        )
        # a step that changes nothing makes their state, which a checkpoint then has a place to go to
        for p in trained:
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self._lessons.forget()
        return optimizers

    def _groups(self, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        """By what multiplies the learning rate."""
        groups: dict[float, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in parameters.items():
            groups[self._scale(name) if parameter.ndim == 2 else 1.0].append(parameter)
        return [{"params": group, "scale": scale} for scale, group in groups.items()]

    def _scale(self, matrix: str) -> float:
        in_attention = any(part in ATTENTION for part in matrix.split("."))
        return self.config.matrix_rate * (self.config.attention_rate if in_attention else 1.0)

    def _feed_at(self, step: int) -> tuple[Feed, int]:
        """What step `step` reads, and the number of steps before the first that reads it."""
        before = 0
        for feed in self.feeds:
            if step <= feed.until:
                return feed, before
            before = feed.until
        raise AssertionError("feeds reach to the last step")

    def tokens_until(self, step: int) -> int:
        before = tokens = 0
        for feed in self.feeds:
            steps = max(0, min(step, feed.until) - before)
            tokens += steps * feed.sequences * feed.mixture.context
            before = feed.until
        return tokens

    def _micro_batches(self, first_step: int) -> Generator[Batch]:
        """This process's share of all steps from `first_step` on."""
        micro, world = self.config.micro_sequences, self.world
        for step in range(first_step, self.config.steps + 1):
            feed, before = self._feed_at(step)
            first = (step - 1 - before) * feed.sequences
            for part in range(world.rank, feed.sequences // micro, world.size):
                yield feed.mixture.batch(first + part * micro, micro)

    def _one_step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        config, start = self.config, time.perf_counter()
        self.step += 1
        step = self.step
        rate = config.learning_rate.at(step)
        factor = config.schedule.at(step) if config.schedule else 0.0
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
        feed, _ = self._feed_at(step)
        parts = feed.sequences // config.micro_sequences // self.world.size
        measured = torch.zeros(4 + self._layers, device=self.device)
        lesson = self._lesson or self._lessons.of(next(batches))
        for part in range(parts):
            measured += self._lessons.learn(lesson, factor, 1 / parts) / parts
            if part + 1 < parts:
                lesson = self._lessons.of(next(batches))
        self.world.mean_gradients(self._trained.values())
        norm = full(torch.nn.utils.clip_grad_norm_(self._trained.values(), config.clip))
        numbers = Numbers(torch.cat([self.world.mean(measured), norm[None]]))
        # a GPU has this to do while the numbers are waited for and the optimizer's kernels are launched
        coming = next(batches, None)
        self._lesson = None if coming is None else self._lessons.of(coming)
        loss, next_token, kl, states, *sparsity, norm = numbers.read()
        taken = math.isfinite(loss) and math.isfinite(norm)
        for optimizer in self._optimizers:
            if taken:
                optimizer.step()
        if self._pull and taken:
            more = self.budget.share(step) if self.budget else 0.0
            self._pull.step(rate * config.pull + more)
        self._lessons.forget()
        self._count_bad(taken, loss)
        layers = np.array(sparsity)
        wanted = self._steer(1 - layers) if taken else None
        return {
            "step": step,
            "lr": rate,
            "lambda": factor,
            "loss": loss,
            "next_token": next_token,
            "kl": kl,
            "states": states,
            "sparsity": float(layers.mean()),
            "wanted": wanted,
            "grad_norm": norm,
            "tokens": self.tokens_until(step),
            "seconds": time.perf_counter() - start,
            **({"size": self.budget.size} if self.budget else {}),
            **({} if taken else {"skipped": True}),
        }

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
        targets = controller.layer_densities(natural, 1 - wanted, control.falls)
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

    def _state(self) -> dict[str, Tensor]:
        """All that a run goes on from, in tensors that may be read or filled in place."""
        state = {
            "thresholds": torch.from_numpy(self._thresholds),
            "natural": torch.from_numpy(self._natural),
            "bad_steps": torch.tensor(self.bad_steps),
        }
        if self.budget:
            state["budget"] = self.budget.state
        for name, parameter in self._trained.items():
            state[f"model.{name}"] = parameter.detach()
            for optimizer in self._optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    state[f"optimizer.{name}.{key}"] = value
        return state

    def _resume(self) -> None:
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(self.folder / "checkpoints", self.world)
        self.world.wait()
        if found is not None:
            state = self._state()
            self.step = checkpoint.load(found, state, self.world)
            self.bad_steps = int(state["bad_steps"])
            for mlp, threshold in zip(self.student.mlps, self._thresholds, strict=True):
                mlp.threshold.fill_(threshold)
        if self.world.is_main:
            _forget_after(self.folder / "metrics.jsonl", self.step)


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
