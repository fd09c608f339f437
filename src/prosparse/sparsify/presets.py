"""The published recipes: Tables 6 and 7 of the paper, the model card of MiniCPM-S-1B, and their ablations."""

from dataclasses import dataclass, replace
from typing import Literal

from prosparse.sparsify.schedule import LambdaSchedule, LearningRate

CONTEXT = 4096  # tokens, everywhere in the paper
ABLATIONS = ("constant-lambda", "relu-only", "shifted-relu")


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps up to `until` on one kind of data: text, then text and instructions, then instructions alone."""

    name: Literal["stable", "decay", "sft"]
    until: int
    tokens_per_step: int


@dataclass(frozen=True, slots=True)
class Preset:
    """One recipe. `hidden_size` and `num_hidden_layers` name the model its factors were found for."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    schedule: LambdaSchedule
    learning_rate: LearningRate
    phases: tuple[Phase, ...]
    threshold: float  # of FATReLU after training (Table 9 and the released configurations)
    shift: float | None = None  # of the shifted-ReLU baseline
    mup_width: int | None = None  # muP: matrices learn at learning_rate * mup_width / hidden_size

    @property
    def matrix_rate(self) -> float:
        """What matrices multiply the learning rate by."""
        return self.mup_width / self.hidden_size if self.mup_width else 1.0

    def tokens_until(self, step: int) -> int:
        """Tokens seen when step `step` ends."""
        tokens = before = 0
        for phase in self.phases:
            tokens += max(0, min(step, phase.until) - before) * phase.tokens_per_step
            before = phase.until
        return tokens

    def table(self) -> list[tuple[str, float, int, float]]:
        """Rows of the card's stage table: name, lambda, accumulated steps, accumulated tokens in billions."""
        stages = self.schedule.stages
        return [(s.name, s.factor, s.until, self.tokens_until(s.until) / 1e9) for s in stages]

    def check_model(self, hidden_size: int, num_hidden_layers: int) -> None:
        """ValueError for another model: factors do not carry over (7B ends at 0.2, 13B at 0.02)."""
        if (hidden_size, num_hidden_layers) != (self.hidden_size, self.num_hidden_layers):
            raise ValueError(
                f"preset {self.name} is for {self.num_hidden_layers} layers of width {self.hidden_size}; "
                f"this model has {num_hidden_layers} of {hidden_size}. Use --target, or a schedule of its own"
            )

    def ablation(self, name: str) -> "Preset":
        """The same training with another path of lambda (Tables 4 and 5)."""
        relu_steps, end = self.schedule.stages[0].until, self.schedule.total_steps
        if name == "constant-lambda":
            peak = max(stage.factor for stage in self.schedule.stages)
            schedule, shift = LambdaSchedule.constant(relu_steps, peak, end), None
        elif name in ("relu-only", "shifted-relu"):
            schedule = LambdaSchedule.constant(relu_steps, 0.0, end)
            shift = 0.1 if name == "shifted-relu" else None
        else:
            raise ValueError(f"unknown ablation {name!r}: known are {', '.join(ABLATIONS)}")
        return replace(self, name=f"{self.name}/{name}", schedule=schedule, shift=shift)


def _cosine(peak: float, steps: int) -> LearningRate:
    return LearningRate("cosine", peak, steps)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "prosparse-llama2-7b",
            hidden_size=4096,
            num_hidden_layers=32,
            schedule=LambdaSchedule.progressive(
                5000, (5e-3, 5e-2, 5e-2, 2e-1, 2e-1), (6000, 10000, 12000, 16000, 16500)
            ),
            learning_rate=_cosine(3e-5, 16500),
            phases=(Phase("stable", 16500, 512 * CONTEXT),),
            threshold=0.01,
        ),
        Preset(
            "prosparse-llama2-13b",
            hidden_size=5120,
            num_hidden_layers=40,
            schedule=LambdaSchedule.progressive(
                5500, (5e-3, 1e-2, 1e-2, 2e-2, 2e-2), (6750, 10750, 11000, 15000, 16000)
            ),
            learning_rate=_cosine(5e-5, 16000),
            phases=(Phase("stable", 16000, 2048 * CONTEXT),),
            threshold=0.01,
        ),
        Preset(
            "minicpm-s-1b",
            hidden_size=1536,
            num_hidden_layers=52,
            schedule=LambdaSchedule.progressive(
                10000,
                (1e-3, 5e-3, 5e-3, 5e-2),
                (15000, 20000, 25000, 35000),
                decay=(5e-2, 95000),
                sft=(1e-2, 101000),
            ),
            # the SFT stage keeps the rate that the decay ends with
            learning_rate=LearningRate("wsd", 1e-2, 101000, stable_until=35000, decay_until=95000),
            phases=(
                Phase("stable", 35000, 1200 * CONTEXT),
                Phase("decay", 95000, 1200 * CONTEXT),
                # "about 473.02 billion tokens within 101,000 steps"
                Phase("sft", 101000, 1_013_333),
            ),
            threshold=0.03,
            mup_width=256,
        ),
    )
}


def by_name(name: str) -> Preset:
    """`prosparse-llama2-7b`, or `prosparse-llama2-7b/relu-only` for an ablation of it."""
    base, _, ablation = name.partition("/")
    if base not in PRESETS:
        raise ValueError(f"unknown preset {base!r}: known are {', '.join(PRESETS)}")
    return PRESETS[base].ablation(ablation) if ablation else PRESETS[base]
