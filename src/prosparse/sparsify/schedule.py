"""The factor of the L1 loss (Algorithm 1 of the paper, Appendix B) and the learning rate over steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True, slots=True)
class Stage:
    """The steps up to `until`, counted from the start of training (stage 0 included)."""

    name: str
    factor: float  # lambda at the last step of the stage
    until: int
    shape: Literal["constant", "sine"] = "constant"  # sine rises from the stage before


@dataclass(frozen=True, slots=True)
class LambdaSchedule:
    """lambda for every step. Steps count from 1, as in Algorithm 1; after the last stage its factor stays."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a schedule needs at least one stage")
        before = Stage("start", 0.0, 0)
        for stage in self.stages:
            if stage.until <= before.until:
                raise ValueError(
                    f"{stage.name} ends at step {stage.until}, but {before.name} at {before.until}: "
                    "steps are accumulated and must rise"
                )
            if not 0 <= stage.factor < math.inf:
                raise ValueError(f"the factor of {stage.name} must be 0 or positive, not {stage.factor}")
            if stage.shape == "sine" and stage.factor < before.factor:
                raise ValueError(
                    f"the factor of {stage.name} is {stage.factor}, below the {before.factor} it rises from"
                )
            before = stage

    @classmethod
    def progressive(
        cls,
        relu_steps: int,
        factors: Sequence[float],
        steps: Sequence[int],
        *,
        decay: tuple[float, int] | None = None,
        sft: tuple[float, int] | None = None,
    ) -> Self:
        """Algorithm 1: ReLU only until `relu_steps`, warm-up at factors[0], then one sine stage a factor.

        `steps[i]` is the accumulated step at which stage i + 1 ends; `decay` and `sft` are (factor, last
        step) of the stages with a fixed factor that may follow.
        """
        if len(factors) != len(steps) or not factors:
            raise ValueError(f"{len(factors)} factors and {len(steps)} steps: give one of each per stage")
        stages = [Stage("relu", 0.0, relu_steps), Stage("warmup", factors[0], steps[0])]
        rest = zip(factors[1:], steps[1:], strict=True)
        stages += [Stage(f"stage {i}", factor, until, "sine") for i, (factor, until) in enumerate(rest, 2)]
        stages += [Stage(name, *fixed) for name, fixed in (("decay", decay), ("sft", sft)) if fixed]
        return cls(tuple(stages))

    @classmethod
    def constant(cls, relu_steps: int, factor: float, until: int) -> Self:
        """The ablation of Table 5: the full factor at once after the ReLU stage. Factor 0 is ReLU only."""
        return cls((Stage("relu", 0.0, relu_steps), Stage("constant", factor, until)))

    @property
    def total_steps(self) -> int:
        return self.stages[-1].until

    def stage_at(self, step: int) -> Stage:
        """The stage that step `step` (from 1) belongs to."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        return next((stage for stage in self.stages if step <= stage.until), self.stages[-1])

    def at(self, step: int) -> float:
        """lambda of step `step` (from 1)."""
        stage = self.stage_at(step)
        if stage.shape == "constant" or step >= stage.until:
            return stage.factor
        index = self.stages.index(stage)
        start, base = (self.stages[index - 1].until, self.stages[index - 1].factor) if index else (0, 0.0)
        return base + rise((step - start) / (stage.until - start)) * (stage.factor - base)


def rise(progress: float) -> float:
    """From 0 to 1 along a sine with zero slope at both ends: eta of Algorithm 1."""
    return (math.sin(-math.pi / 2 + progress * math.pi) + 1) / 2


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Learning rate by step (from 1).

    "cosine" falls to `floor` of the peak over `total_steps` (the authors' scheduler: 10 %). "wsd", the one of
    MiniCPM (arXiv 2404.06395), is constant until `stable_until`, then halves every `half_life` steps, and is
    constant again from `decay_until` on.
    """

    kind: Literal["cosine", "wsd", "constant"]
    peak: float
    total_steps: int
    warmup_steps: int = 0
    floor: float = 0.1
    stable_until: int = 0
    half_life: int = 5000
    decay_until: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "wsd", "constant"):
            raise ValueError(f"a learning rate is cosine, wsd or constant, not {self.kind!r}")
        if not 0 < self.peak < math.inf:
            raise ValueError(f"the learning rate must be positive, not {self.peak}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"{self.warmup_steps} warm-up steps do not fit {self.total_steps} steps")

    def at(self, step: int) -> float:
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind == "wsd":
            step = min(step, self.decay_until or step)
            return self.peak * 0.5 ** (max(0, step - self.stable_until) / self.half_life)
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.peak * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2)
