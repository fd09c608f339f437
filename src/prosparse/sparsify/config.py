"""How one training run goes, whatever it is fed with."""

import math
from dataclasses import dataclass, field
from typing import Literal

from prosparse.sparsify.controller import TargetControl
from prosparse.sparsify.losses import LossMix
from prosparse.sparsify.regularizer import Norm
from prosparse.sparsify.schedule import LambdaSchedule, LearningRate


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run. `schedule` is the paper's path, `control` that of a target; with neither, the activation is
    merely trained with."""

    steps: int
    micro_sequences: int  # at a time; a step accumulates over them
    learning_rate: LearningRate
    mix: LossMix = field(default_factory=LossMix)
    schedule: LambdaSchedule | None = None
    l1_norm: Norm = "mean"
    control: TargetControl | None = None
    concentration: float = 0.1  # weight of that regulariser, under control
    optimizer: Literal["adamw", "muon"] = "adamw"
    matrix_rate: float = 1.0  # matrices multiply the learning rate by it (muP)
    attention_rate: float = 1.0  # those of attention by this, too
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    pull: float = 0.0  # to the original's weights
    noise: float = 0.0  # every second sequence has it, where sparsity is then not measured
    clip: float = 1.0  # norm of the gradients
    document_mask: bool = False  # tokens see only their own document
    bfloat16: bool = False  # products in bfloat16, weights stay float32
    compile: bool = False
    recompute: bool = False  # activations of a layer are computed again for its gradients, not kept
    checkpoint_every: int = 200
    max_bad_steps: int = 10  # in a row

    def __post_init__(self) -> None:
        for name in ("steps", "micro_sequences", "checkpoint_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.concentration < math.inf:
            raise ValueError(f"the weight of concentration must not be negative, not {self.concentration}")
        if not 0 < self.attention_rate < math.inf:
            raise ValueError(f"attention's share of the learning rate is above 0, not {self.attention_rate}")
        if not 0 <= self.pull < math.inf:
            raise ValueError(f"the pull to the original must not be negative, not {self.pull}")
        if self.pull and not self.mix.taught:
            raise ValueError("a pull to the original needs distillation, which has the original at hand")
        if self.noise and self.micro_sequences % 2:
            raise ValueError(
                "noise in every second sequence needs an even number of them at a time: choose --micro and "
                f"--batch-tokens so that it is not {self.micro_sequences}"
            )
        if self.noise and self.mix.next_token:
            raise ValueError("noise is for distillation alone: the next-token loss would learn it")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"the optimizer is adamw or muon, not {self.optimizer!r}")
        if self.schedule and self.control:
            raise ValueError("give a schedule of lambda or a target, not both")
