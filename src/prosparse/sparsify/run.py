"""`prosparse sparsify`: train a Swish model to be sparse, by a target or by a published recipe."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosparse import options
from prosparse.sparsify import presets, settings
from prosparse.sparsify.loggers import LOGGERS

if TYPE_CHECKING:
    from prosparse.sparsify.presets import Preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a model with a Swish FFN sparse: puts ReLU in, trains it to the original's output while "
        "sparsity rises to --target (or by a recipe, --preset), and writes a Hugging Face folder. The same "
        "command goes on where an interrupted one stopped; under torchrun it runs on many GPUs."
    )
    _add_data(parser.add_argument_group("model and data"))
    _add_method(parser.add_argument_group("method"))
    _add_machine(parser.add_argument_group("machine and output"))


def _add_data(group: Any) -> None:
    add = group.add_argument
    add(
        "-m",
        "--model",
        metavar="M",
        help="GGUF file, Hugging Face folder, Hub id (org/name), demo or demo-original",
    )
    add("--from", dest="start", metavar="M", help="the model to start with, where it is not the original")
    add(
        "--data",
        action="append",
        default=[],
        metavar="D[:WEIGHT]",
        help="file, folder, hf:NAME or store of an earlier run; may be repeated",
    )
    add("--decay-data", action="append", default=[], metavar="D", help="of a preset's decay stage [all data]")
    add("--sft-data", action="append", default=[], metavar="D", help="of a preset's instruction stage")
    add("--self-data", metavar="N[:WEIGHT]", help="also train on N tokens that the original model writes")
    add(
        "--self-prompts",
        type=float,
        default=0.0,
        metavar="X",
        help="share of those tokens' rows that goes on from how documents of --data begin [0]",
    )
    add("--tokens", type=float, default=50e6, metavar="N", help="tokens to train on, for --target [50e6]")
    add("--context", type=int, metavar="N", help="tokens a sequence [1024, or the preset's 4096]")
    add("--batch-tokens", type=int, metavar="N", help="tokens a step [65536, or the preset's]")
    add("--document-mask", action="store_true", help="tokens see only their own document")
    add(
        "--noise",
        type=float,
        default=0.0,
        metavar="X",
        help="in every second sequence, replace this share of tokens by random ones [0]",
    )
    add("--held-out", type=int, default=32, metavar="N", help="sequences a source kept for the report [32]")


def _add_method(group: Any) -> None:
    way = group.add_mutually_exclusive_group()
    way.add_argument("--target", type=float, metavar="S", help="sparsity to reach, by thresholds [0.9]")
    way.add_argument("--l1", metavar="F,F,...", help="or by L1, the paper's way: a factor a stage, rising")
    way.add_argument(
        "--preset", metavar="P", help=f"{', '.join(presets.PRESETS)}; P/{', P/'.join(presets.ABLATIONS)}"
    )
    add = group.add_argument
    add("--dry-run", action="store_true", help="print the stages of --preset and stop")
    add("--reach", type=float, metavar="X", help="share of training after which --target stands [0.75]")
    add(
        "--concentration",
        type=float,
        metavar="X",
        help="weight of the loss that favours few large activations, for --target [0.1]",
    )
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon learns faster [adamw]")
    add("--lr", type=float, metavar="X", help="peak learning rate [5e-4, 1e-3 with --lora, or the preset's]")
    add(
        "--attention-rate",
        type=float,
        default=1.0,
        metavar="X",
        help="share of it that attention's matrices learn at [1]",
    )
    add("--lr-floor", type=float, default=0.1, metavar="X", help="share of it that the last step has [0.1]")
    add("--distil", type=float, default=1.0, metavar="X", help="weight of the KL to the original [1]")
    add("--temperature", type=float, default=1.0, metavar="T", help="of that KL [1]")
    add("--top-k", type=int, metavar="K", help="that KL over the original's K likeliest tokens only")
    add("--next-token", type=float, default=0.0, metavar="X", help="weight of the next-token loss [0]")
    add(
        "--pull",
        type=float,
        default=0.0,
        metavar="X",
        help="draw weights back to the original's, X lr a step [0]",
    )
    add("--states", type=float, default=0.0, metavar="X", help="weight of hidden states' difference [0]")
    add("--keep-embeddings", action="store_true", help="leave embeddings and head as the original has them")
    small = group.add_mutually_exclusive_group()
    small.add_argument(
        "--lora", metavar="R[:A]", help="train adapters of rank R (A in attention), norms, no other weights"
    )
    small.add_argument(
        "--levels",
        metavar="L[:A][,KIND=L]",
        help="train changes rounded to 2, 3 or 5 levels of a step a row (A in attention), as 3:2 or "
        "3,gate_proj=2, beginning with those of --from; 0: what stays the original's",
    )
    small.add_argument(
        "--codes",
        type=Path,
        metavar="A",
        help="train the codes of this adapter, on its steps, and write DIR/adapter.gguf; convert --size "
        "makes one to begin with",
    )
    add(
        "--size",
        type=float,
        metavar="MB",
        help="of that adapter, which a harder pull keeps to it, within a percent or so [as it is]",
    )
    add("--control", action="store_true", help="also train the un-sparsified twin on the same tokens")


def _add_machine(group: Any) -> None:
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the run; one that exists goes on where it stopped")
    add(
        "--type",
        default="bf16",
        choices=("f32", "f16", "bf16"),
        help="of the weights that are written [bf16]",
    )
    add("--device", help="torch device [cuda if there is one]")
    add("--micro", type=int, default=8, metavar="N", help="sequences at a time; lower it to save memory [8]")
    add("--recompute", action="store_true", help="save memory: compute activations again for gradients")
    add("--shard", action="store_true", help="under torchrun: spread the model, where one GPU has no room")
    add("--compile", action="store_true", help="torch.compile: starts slower, three times faster on a GPU")
    add("--checkpoint-every", type=int, default=200, metavar="N", help="steps [200]")
    add("--workers", type=int, metavar="N", help="processes that tokenise [one per core]")
    add("--seed", type=int, default=0, metavar="N")
    add(
        "--log",
        action="append",
        default=[],
        metavar="L",
        help=f"also log to {', '.join(LOGGERS)}; may be repeated",
    )
    add("--json", action="store_true", help="end with one JSON object on the last line")


def main(args: argparse.Namespace) -> int:
    preset = presets.by_name(args.preset) if args.preset else None
    if args.context is None:
        args.context = presets.CONTEXT if preset else 1024
    if args.dry_run:
        if preset is None:
            raise ValueError("--dry-run shows the stages of a --preset; give one")
        _dry_run(preset, args.out)
        return 0
    if not (args.model and args.out):
        raise ValueError("give the model (-m), text to train on (--data) and a folder for the run (--out)")
    reads = settings.readings(args, preset)
    try:
        import torch
    except ImportError:
        raise ValueError(
            "training needs torch: install the build for your machine from pytorch.org"
        ) from None
    from prosparse.sparsify import distributed
    from prosparse.sparsify.session import Session

    world, device = distributed.join(args.device, args.shard)
    try:
        result = Session(args, preset, reads, world, device).run()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of GPU memory: lower --micro, use --recompute, or --shard on several GPUs ({error})"
        ) from None
    finally:
        distributed.leave()
    if args.json and world.is_main:
        options.print_json(result)
    if world.size > 1:
        distributed.end(0)
    return 0


def stage_table(preset: "Preset") -> str:
    """The table of the model card."""
    rows = [("stage", "lambda", "steps", "tokens, billions")]
    rows += [
        (name, f"{factor:g}", f"{until:,}", f"{tokens:.2f}") for name, factor, until, tokens in preset.table()
    ]
    return "\n".join(f"{a:<10}{b:>8}{c:>10}{d:>18}" for a, b, c, d in rows)


def _dry_run(preset: "Preset", out: Path | None) -> None:
    schedule = preset.schedule
    width = min(72, shutil.get_terminal_size().columns - 12)
    print(stage_table(preset))
    print()
    print(settings.lambda_chart(schedule.at, schedule.total_steps, width))
    if out is not None:
        from prosparse.sparsify.plot import plot_schedule

        plot_schedule(preset, out / "lambda.png")
        print(f"{out / 'lambda.png'}", file=sys.stderr)
