"""`prosparse sparsify`: train a Swish model to be sparse, by a target or by a published recipe."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse import __version__, options
from prosparse.sparsify import presets
from prosparse.sparsify.controller import TargetControl
from prosparse.sparsify.corpus import Source
from prosparse.sparsify.schedule import LearningRate

if TYPE_CHECKING:
    from prosparse.model.model import Model
    from prosparse.sparsify.batches import Mixture
    from prosparse.sparsify.trainer import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", metavar="M", help="GGUF file, Hugging Face folder, Hub id (org/name), or demo")
    add(
        "--data",
        action="append",
        default=[],
        metavar="D[:WEIGHT]",
        help="file, folder or hf:NAME; may be repeated",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the run; one that exists goes on where it stopped")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--target", type=float, metavar="S", help="sparsity to reach, by thresholds [0.9]")
    way.add_argument(
        "--preset", metavar="P", help=f"{', '.join(presets.PRESETS)}; P/{', P/'.join(presets.ABLATIONS)}"
    )
    add("--dry-run", action="store_true", help="print the stages of --preset and stop")
    add("--tokens", type=float, default=50e6, metavar="N", help="tokens to train on, for --target [50e6]")
    add("--context", type=int, metavar="N", help="tokens a sequence [1024, or the preset's 4096]")
    add("--batch-tokens", type=int, metavar="N", help="tokens a step [65536, or the preset's]")
    add("--micro", type=int, default=8, metavar="N", help="sequences at a time; lower it to save memory [8]")
    add("--lr", type=float, metavar="X", help="peak learning rate [5e-4, or the preset's]")
    add("--distil", type=float, default=1.0, metavar="X", help="weight of the KL to the original [1]")
    add("--next-token", type=float, default=0.0, metavar="X", help="weight of the next-token loss [0]")
    add("--document-mask", action="store_true", help="tokens see only their own document")
    add(
        "--type",
        default="bf16",
        choices=("f32", "f16", "bf16"),
        help="of the weights that are written [bf16]",
    )
    add("--device", help="torch device [cuda if there is one]")
    add(
        "--compile",
        action="store_true",
        help="torch.compile: slower to start, three times faster steps on a GPU",
    )
    add("--workers", type=int, metavar="N", help="processes that tokenise [one per core]")
    add("--seed", type=int, default=0, metavar="N")
    add("--json", action="store_true", help="end with one JSON object on the last line")


def main(args: argparse.Namespace) -> int:
    preset = presets.by_name(args.preset) if args.preset else None
    if args.context is None:
        args.context = presets.CONTEXT if preset else 1024
    if args.dry_run:
        if preset is None:
            raise ValueError("--dry-run shows the stages of a --preset; give one")
        print(stage_table(preset))
        return 0
    if not (args.model and args.data and args.out):
        raise ValueError("give the model (-m), text to train on (--data) and a folder for the run (--out)")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError(
            "training needs torch: install the build for your machine from pytorch.org"
        ) from None
    result = sparsify(args, preset)
    if args.json:
        options.print_json(result)
    return 0


def stage_table(preset: presets.Preset) -> str:
    """The table of the model card."""
    rows = [("stage", "lambda", "steps", "tokens, billions")]
    rows += [
        (name, f"{factor:g}", f"{until:,}", f"{tokens:.2f}") for name, factor, until, tokens in preset.table()
    ]
    return "\n".join(f"{a:<10}{b:>8}{c:>10}{d:>18}" for a, b, c, d in rows)


def sparsify(args: argparse.Namespace, preset: presets.Preset | None) -> dict[str, Any]:
    """The run and its results; `args.out` gets `model/`, `training.json`, `metrics.jsonl`, `metrics.png`."""
    import torch

    from prosparse.formats import open_model
    from prosparse.formats.files import written_whole
    from prosparse.formats.hf import write_folder
    from prosparse.model.activation import Activation
    from prosparse.sparsify import hf_model
    from prosparse.sparsify.trainer import Trainer

    original = open_model(args.model)
    if preset:
        preset.check_model(original.config.hidden_size, original.config.num_hidden_layers)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = train_config(args, preset, bfloat16=device.type == "cuda")
    # before anything slow: what cannot be right is said now
    mixture = _mixture(args, original)
    if preset:
        activation = Activation("shiftrelu", preset.shift) if preset.shift else Activation("relu")
    else:
        activation = Activation("fatrelu", 0.0)
    changed = replace(original, config=replace(original.config, activation=activation))
    student = hf_model.load(changed, device=device)
    teacher = None
    if config.mix.distil:
        teacher = hf_model.load(
            original, device=device, dtype=torch.bfloat16 if config.bfloat16 else torch.float32
        )
    trainer = Trainer(student, teacher, mixture, config, args.out)
    described = {
        "prosparse": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "model": str(args.model),
        "data": args.data,
        "preset": args.preset,
        "seed": args.seed,
        "context": args.context,
        "config": asdict(config),
    }
    with written_whole(args.out / "training.json") as file:
        file.write(json.dumps(described, indent=1).encode() + b"\n")
    last = _train(trainer)
    _plot(args.out)
    model = hf_model.to_model(student, original, args.type.upper())
    write_folder(args.out / "model", model, args.type.upper())
    activation = model.config.activation
    print(
        f"{args.out / 'model'}: {activation.name} {activation.param:g}, sparsity {last['sparsity']:.1%} "
        f"after {last['tokens'] / 1e6:.1f} M tokens, KL to the original {last['kl']:.4f} nats"
    )
    return {
        "model": str(args.out / "model"),
        "hidden_act": activation.name,
        "hidden_act_param": activation.param,
        **{key: last[key] for key in ("step", "tokens", "loss", "next_token", "kl", "sparsity")},
    }


def _plot(folder: Path) -> None:
    from prosparse.sparsify.plot import plot

    try:
        plot(folder / "metrics.jsonl", folder / "metrics.png")
    except ImportError:
        print("no curves: install matplotlib for metrics.png")


def train_config(args: argparse.Namespace, preset: presets.Preset | None, bfloat16: bool) -> "TrainConfig":
    """The run the options describe."""
    from prosparse.sparsify.losses import LossMix
    from prosparse.sparsify.trainer import TrainConfig

    batch_tokens = args.batch_tokens or (preset.tokens_per_step if preset else 1 << 16)
    sequences = max(1, batch_tokens // args.context)
    # the step keeps its size: the largest part of at most --micro that divides it
    micro = next(n for n in range(max(1, min(args.micro, sequences)), 0, -1) if sequences % n == 0)
    steps = preset.schedule.total_steps if preset else max(1, round(args.tokens / (sequences * args.context)))
    if preset:
        rate = replace(preset.learning_rate, peak=args.lr) if args.lr else preset.learning_rate
    else:
        warmup = min(100, steps // 20)
        rate = LearningRate("cosine", args.lr or 5e-4, max(steps, 2), warmup_steps=warmup)
    return TrainConfig(
        steps=steps,
        sequences=sequences,
        micro_sequences=micro,
        learning_rate=rate,
        mix=LossMix(args.next_token, args.distil),
        schedule=preset.schedule if preset else None,
        matrix_rate=preset.matrix_rate if preset else 1.0,
        control=None if preset else TargetControl(0.9 if args.target is None else args.target),
        document_mask=args.document_mask,
        bfloat16=bfloat16,
        compile=args.compile,
    )


def _mixture(args: argparse.Namespace, original: "Model") -> "Mixture":
    from prosparse.sparsify import tokens
    from prosparse.sparsify.batches import Mixture

    sources = [Source.parse(text) for text in args.data]
    config = original.config
    encoder = tokens.Encoder(original.tokenizer, config.bos_token_id, config.eos_token_ids)
    stores = []
    for source in sources:

        def show(rows: int, count: int, path: str = source.path) -> None:
            if sys.stderr.isatty():
                print(f"\r{path}: {rows} rows, {count / 1e6:.1f} M tokens", end="", file=sys.stderr)

        store = tokens.build(source.path, encoder, args.out / "tokens", workers=args.workers, progress=show)
        print(f"{source.path}: {len(store.offsets) - 1} rows, {len(store.tokens) / 1e6:.1f} M tokens")
        stores.append(store)
    weights = [source.weight for source in sources]
    return Mixture(stores, weights, context=args.context, seed=args.seed, vocab_size=config.vocab_size)


def _train(trainer: Any) -> dict[str, Any]:
    """Runs with a progress line; the last step's metrics."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=trainer.config.steps, completed=trainer.step)

        def show(metrics: dict[str, Any]) -> None:
            speed = trainer.config.sequences * trainer.mixture.context / metrics["seconds"]
            way = f"wanted {metrics['wanted']:.1%}" if metrics["wanted"] is not None else ""
            way = f"lambda {metrics['lambda']:.2g}" if metrics["lambda"] else way
            description = (
                f"step {metrics['step']} loss {metrics['loss']:.3f} sparsity {metrics['sparsity']:.1%} {way} "
                f"{speed:,.0f} tok/s"
            )
            progress.update(task, completed=metrics["step"], description=description)

        trainer.run(show)
    log = (trainer.folder / "metrics.jsonl").read_text().splitlines()
    last: dict[str, Any] = json.loads(log[-1])
    return last
