"""From the options of `prosparse sparsify` to the settings of a run."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse.sparsify.controller import TargetControl
from prosparse.sparsify.corpus import Source
from prosparse.sparsify.presets import Phase, Preset
from prosparse.sparsify.schedule import LambdaSchedule, LearningRate

if TYPE_CHECKING:
    from prosparse.sparsify.config import TrainConfig

# what may differ between a run and the same command again: none of it changes what is learnt
_FREE = ("prosparse", "torch", "device", "processes")
_FREE_CONFIG = ("compile", "recompute", "micro_sequences", "checkpoint_every", "max_bad_steps")


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read up to and including step `until`: `sequences` a step out of `sources`."""

    sources: tuple[Source, ...]
    sequences: int
    until: int


def readings(args: argparse.Namespace, preset: Preset | None) -> list[Reading]:
    """The data of every phase. ValueError for data that a phase lacks, or that no phase reads."""
    text, decay, sft = (
        tuple(map(Source.parse, given)) for given in (args.data, args.decay_data, args.sft_data)
    )
    if preset is None:
        sequences = max(1, (args.batch_tokens or 1 << 16) // args.context)
        steps = max(1, round(args.tokens / (sequences * args.context)))
        phases: Sequence[Phase] = [Phase("stable", steps, sequences * args.context)]
    else:
        phases = preset.phases
    names = [phase.name for phase in phases]
    for name, given in (("decay", decay), ("sft", sft)):
        if given and name not in names:
            raise ValueError(f"--{name}-data is for presets with such a stage; give --data alone")
    if "sft" in names and not sft:
        raise ValueError(f"{preset and preset.name} ends with a stage on instructions alone: give --sft-data")
    if not text and not (preset is None and args.self_data):
        raise ValueError("give text to train on: --data FILE, or --self-data N")
    if not 0 <= args.self_prompts <= 1:
        raise ValueError(f"--self-prompts is a share, 0 to 1, not {args.self_prompts}")
    if args.self_prompts and not (text and args.self_data):
        raise ValueError("--self-prompts is for --self-data, which goes on from text of --data: give both")
    sources = {"stable": text, "decay": decay or (*text, *sft), "sft": sft}
    return [
        Reading(
            sources[phase.name],
            max(1, (args.batch_tokens or phase.tokens_per_step) // args.context),
            phase.until,
        )
        for phase in phases
    ]


def train_config(
    args: argparse.Namespace,
    preset: Preset | None,
    reads: Sequence[Reading],
    *,
    bfloat16: bool,
    processes: int = 1,
    thresholds: bool = False,
) -> "TrainConfig":
    """The run the options describe. `thresholds`: the model it starts from has some already."""
    from prosparse.sparsify.config import TrainConfig
    from prosparse.sparsify.losses import LossMix

    steps = reads[-1].until
    if preset:
        rate = replace(preset.learning_rate, peak=args.lr) if args.lr else preset.learning_rate
    else:
        peak = args.lr or (1e-3 if args.lora is not None else 5e-4)
        rate = LearningRate("cosine", peak, max(steps, 2), min(100, steps // 20), args.lr_floor)
    schedule, control = (preset.schedule, None) if preset else _way(args, steps, thresholds)
    if args.concentration is not None and control is None:
        raise ValueError("--concentration is for --target")
    if args.pull and args.lora is not None:
        raise ValueError(
            "--pull is for all weights or --levels: what --lora adds has no original to return to"
        )
    config = TrainConfig(
        steps=steps,
        micro_sequences=_micro(args.micro, [read.sequences for read in reads], processes),
        learning_rate=rate,
        mix=LossMix(args.next_token, args.distil, args.temperature, args.top_k, args.states),
        schedule=schedule,
        optimizer=args.optimizer,
        matrix_rate=preset.matrix_rate if preset else 1.0,
        attention_rate=args.attention_rate,
        control=control,
        pull=args.pull,
        noise=args.noise,
        document_mask=args.document_mask,
        bfloat16=bfloat16,
        compile=args.compile,
        recompute=args.recompute,
        checkpoint_every=args.checkpoint_every,
    )
    if args.concentration is None:
        return config
    return replace(config, concentration=args.concentration)


def _way(
    args: argparse.Namespace, steps: int, thresholds: bool
) -> tuple[LambdaSchedule | None, TargetControl | None]:
    """Without a preset: the paper's path with the factors of --l1, or the target."""
    control = TargetControl(0.9 if args.target is None else args.target)
    if args.l1 is None:
        end = control.end if args.reach is None else args.reach
        return None, replace(control, start=0.0 if thresholds else control.start, end=end, falls=thresholds)
    if args.reach is not None:
        raise ValueError("--reach is for --target; the stages of --l1 are of equal length")
    try:
        factors = [float(factor) for factor in args.l1.split(",")]
    except ValueError:
        raise ValueError(f"--l1 is the factors of the stages, as 1e-3,5e-3,5e-2, not {args.l1!r}") from None
    relu = round(control.start * steps)
    ends = [relu + round((steps - relu) * (i + 1) / len(factors)) for i in range(len(factors))]
    if relu < 1 or len(set(ends)) < len(ends):
        raise ValueError(f"{steps} steps are too few for a ReLU stage and {len(factors)} stages of --l1")
    return LambdaSchedule.progressive(relu, factors, ends), None


def _micro(most: int, sequences: Sequence[int], processes: int) -> int:
    """Sequences at a time on each process: steps keep their size, so it is the largest that divides them."""
    for n in range(max(1, min(most, *sequences)), 0, -1):
        if all(count % (n * processes) == 0 for count in sequences):
            return n
    raise ValueError(
        f"steps of {' and '.join(map(str, sequences))} sequences cannot be shared evenly by {processes} "
        "processes: choose --batch-tokens so that they can"
    )


def check_same(path: Path, described: Mapping[str, Any]) -> None:
    """ValueError if the folder holds a run with other settings, which this one must not go on from."""
    if not path.exists():
        return
    before = json.loads(path.read_text())
    # as it is read back: tuples are lists there
    now = json.loads(json.dumps(described))
    differ = [key for key in now if key not in (*_FREE, "config") and before.get(key) != now[key]]
    old, new = before.get("config", {}), now["config"]
    differ += [key for key in new if key not in _FREE_CONFIG and old.get(key) != new[key]]
    if differ:
        raise ValueError(
            f"{path.parent} holds a run with another {', '.join(differ)}: repeat its options to go on with "
            "it, or choose another --out"
        )


def check_space(free: int, trained: int, parameters: int) -> None:
    """ValueError if `free` bytes of disk do not hold a run's checkpoints and model."""
    # two checkpoints and one being written, each with two moments, all float32; the model is written once
    needed = 3 * 12 * trained + 4 * parameters
    if free < needed:
        raise ValueError(
            f"checkpoints and the model need {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free: "
            "choose another --out"
        )


def lambda_chart(at: Callable[[int], float], steps: int, width: int = 72, height: int = 8) -> str:
    """lambda over all steps, in characters."""
    values = [at(max(1, round(steps * (i + 1) / width))) for i in range(width)]
    top = max(values) or 1.0
    blocks = " ▁▂▃▄▅▆▇█"
    lines = []
    for row in range(height, 0, -1):
        filled = [round(8 * min(1.0, max(0.0, value / top * height - row + 1))) for value in values]
        label = f"{top:g}" if row == height else ""
        lines.append(f"{label:>8} │" + "".join(blocks[n] for n in filled).rstrip())
    lines.append(f"{'0':>8} └" + "─" * width)
    lines.append(" " * 10 + "step 1" + f"{steps:,}".rjust(width - 6))
    return "\n".join(lines)
