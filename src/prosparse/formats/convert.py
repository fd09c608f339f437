"""`prosparse convert`: between HF folders, GGUF and PowerInfer files; quantisation, folding, adapters."""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats import predictors
from prosparse.formats.adapter import read as read_adapter
from prosparse.formats.gguf import read_gguf, write_gguf
from prosparse.formats.hf import write_folder
from prosparse.formats.open import find, interleave, open_model
from prosparse.formats.quants import NATIVE, with_type
from prosparse.model import names
from prosparse.model.adapter import apply
from prosparse.model.config import ModelConfig
from prosparse.model.fold import fold_scales
from prosparse.model.model import BLOCKS, Model, Tensor
from prosparse.model.predictor import Predictors

_FLOATS = ("F32", "F16", "BF16")
_SMALL = ("Q5_1", "Q4_1", "Q4_0")
_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")
# general.file_type, which llama.cpp shows as the file's type
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_1": 9, "BF16": 32}


def convert(
    source: str | Path,
    target: str | Path,
    kind: str | None = None,
    *,
    fold: bool = False,
    pure: bool = False,
    keep_predictors: bool = True,
    adapter: str | Path | None = None,
) -> Model:
    """Convert the model at `source` to a GGUF file (`target` ends in .gguf) or an HF folder; returns what
    was written.

    `kind` is the type of the matrices; None keeps theirs, or for an HF folder makes quantised ones F16.
    Types of 4 and 5 bits keep embedding, output and predictors at Q8_0 unless `pure`. Vectors are always F32.
    The file `adapter` is merged into the model; quantised matrices that it changes become Q8_0 unless `kind`
    says otherwise.
    """
    model = open_model(source)
    target = Path(target)
    to_gguf = target.suffix == ".gguf"
    if kind is not None and kind not in (NATIVE if to_gguf else _FLOATS):
        raise ValueError(
            f"an HF folder holds f32, f16 or bf16, not {kind.lower()}; name a .gguf file instead"
        )
    if not to_gguf and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists: an HF folder is only written to a new or empty place")
    stored = {name: tensor.type for name, tensor in model.tensors.items()}
    stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    if adapter is not None:
        model = apply(model, read_adapter(Path(adapter)))
        stored = {n: t if t in _FLOATS or n in _TOKENS else "Q8_0" for n, t in stored.items()}
    if fold:
        model = fold_scales(model)
    tensors = {}
    for name, tensor in model.tensors.items():
        if len(tensor.shape) == 1:
            wanted = "F32"
        elif kind is None:
            wanted = _kept_type(stored[name], tensor, to_gguf)
        elif kind in _SMALL and not pure and name in _TOKENS:
            wanted = "Q8_0"
        else:
            wanted = kind
        tensors[name] = with_type(tensor, wanted)
    kept = model.predictors if keep_predictors else None
    if kept:
        kept = _retyped(kept, "Q8_0" if kind in _SMALL and not pure else kind, to_gguf)
    model = Model(model.config, tensors, model.tokenizer, model.name, kept)
    if to_gguf:
        write_model(target, model, provenance(source))
    else:
        write_folder(target, model, _main_type(tensors))
    return model


def _kept_type(stored: str, tensor: Tensor, to_gguf: bool) -> str:
    """The type of the source; Q8_0 for a folded matrix whose type we cannot write."""
    if not to_gguf:
        return stored if stored in _FLOATS else "F16"
    return stored if tensor.type == stored or stored in NATIVE else "Q8_0"


def _retyped(predictors: Predictors, kind: str | None, to_gguf: bool) -> Predictors:
    """Networks in this type, or where their rows are no whole number of its blocks, in F16."""

    def one(tensor: Tensor) -> Tensor:
        wanted = kind or _kept_type(tensor.type, tensor, to_gguf)
        return with_type(tensor, "F16" if tensor.shape[1] % BLOCKS[wanted][0] else wanted)

    return replace(predictors, networks=tuple((one(a), one(b)) for a, b in predictors.networks))


def _main_type(tensors: Mapping[str, Tensor]) -> str:
    """The type of most bytes of the matrices."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) == 2:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
    return max(sizes, key=lambda kind: sizes[kind])


def provenance(source: str | Path) -> dict[str, Any]:
    """Licence, authors and the like: the general keys of a GGUF source that describe no layout."""
    path = find(source)
    if path.is_dir():
        return {}
    ours = ("architecture", "type", "name", "file_type", "alignment", "quantization_version")
    skipped = {f"general.{key}" for key in ours}
    metadata = read_gguf(path).metadata
    return {k: v for k, v in metadata.items() if k.startswith("general.") and k not in skipped}


def write_model(path: Path, model: Model, more: Mapping[str, Any] | None = None) -> None:
    """Write a model as a GGUF file, with tokenizer, activation and predictors; `more` are further keys."""
    config = model.config
    settings = config.to_gguf()
    general: dict[str, Any] = {
        "general.type": "model",
        "general.name": model.name,
        "general.quantization_version": 2,
    }
    main_type = _main_type(model.tensors)
    if main_type in _FILE_TYPES:
        general["general.file_type"] = _FILE_TYPES[main_type]
    # the settings stand first, and win over the tokenizer's where both name the end tokens
    tokenizer = model.tokenizer.to_gguf_metadata(config.vocab_size)
    metadata = settings | general | dict(more or {}) | tokenizer | settings
    if model.predictors:
        metadata |= predictors.gguf_metadata(model.predictors)
    tensors = dict(_rope_factors(config))
    for name, tensor in model.tensors.items():
        gguf_name = names.to_gguf(name)
        assert gguf_name, "a Model has only names of the table"
        if heads := names.interleaved_heads(config, name):
            tensor = Tensor(tensor.type, tensor.shape, partial(_interleaved, tensor, heads))
        tensors[gguf_name] = tensor
    if model.predictors:
        tensors |= predictors.gguf_tensors(model.predictors)
    write_gguf(path, metadata, tensors)


def _interleaved(tensor: Tensor, heads: int) -> np.ndarray:
    return interleave(tensor.data, heads)


def _rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """GGUF keeps llama3's scaling, and any other list of factors, as a tensor."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type not in ("llama3", "factors"):
        return {}
    factors = scaling.frequency_divisors(config.head_dim, config.rope_theta).astype(np.float32)
    return {"rope_freqs.weight": Tensor("F32", factors.shape, factors.view(np.uint8))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="GGUF file, HF folder, Hub id, demo, demo-original")
    parser.add_argument("target", metavar="DST", help="a name ending in .gguf, or a new HF folder")
    parser.add_argument(
        "--type",
        choices=[name.lower() for name in NATIVE],
        help="type of the matrices (default: as they are)",
    )
    parser.add_argument("--pure", action="store_true", help="4- and 5-bit types for embedding and output too")
    parser.add_argument("--fold", action="store_true", help="fold MiniCPM's scales into plain LLaMA weights")
    parser.add_argument("--no-predictors", action="store_true", help="leave the activation predictors out")
    group = parser.add_argument_group("adapters")
    group.add_argument("--adapter", metavar="FILE", help="merge this adapter into SRC")
    group.add_argument("--base", metavar="M", help="write the adapter that makes SRC of this model")
    group.add_argument(
        "--rank", metavar="R", help="of the adapter: one, or those of FFNs and attention as 80:32 [64]"
    )
    group.add_argument(
        "--levels",
        metavar="L",
        help="of the adapter: codes of 2, 3 or 5 levels, or those of FFNs and attention as 3:2; 0: factors "
        "[0]; exceptions follow, as 3,gate_proj=2",
    )
    group.add_argument(
        "--size",
        type=float,
        metavar="MB",
        help="of the adapter: codes as fine as what they are worth on --data, which fit into this size",
    )
    group.add_argument("--data", action="append", metavar="D", help="of --size: text; may be repeated")
    group.add_argument("--tokens", type=int, metavar="N", help="of each --data [4096]")
    group.add_argument("--device", help="of --size: a torch device [cuda if there is one]")
    group.add_argument("--name", metavar="TEXT", help="of the model that the adapter makes [SRC's]")
    group.add_argument("--measured", type=Path, metavar="FILE", help="a JSON object to keep in the adapter")
    group = parser.add_argument_group("PowerInfer")
    group.add_argument("--powerinfer", action="store_true", help="write a file that PowerInfer runs (PWRI)")
    group.add_argument(
        "--as-relu", action="store_true", help="let it run a FATReLU model as relu, without the threshold"
    )
    group.add_argument(
        "--activation-stats",
        metavar="DIR",
        help="of `prosparse stats`: write activation/activation_N.pt beside DST",
    )
    group.add_argument(
        "--vram-budget",
        type=float,
        metavar="GIB",
        help="of PowerInfer's option: write which neurons go to the GPU, DST.generated.gpuidx",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")


def main(args: argparse.Namespace) -> int:
    start = time.monotonic()
    kind = args.type.upper() if args.type else None
    if not args.base:
        for name in ("rank", "levels", "size", "data", "tokens", "device", "name", "measured"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is of an adapter to be written: add --base")
    if args.powerinfer:
        return _main_for_powerinfer(args, kind)
    for name in ("as_relu", "activation_stats", "vram_budget"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for PowerInfer files: add --powerinfer")
    if args.base:
        return _main_for_adapter(args, kind)
    model = convert(
        args.source,
        args.target,
        kind,
        fold=args.fold,
        pure=args.pure,
        keep_predictors=not args.no_predictors,
        adapter=args.adapter,
    )
    seconds = time.monotonic() - start
    act = model.config.activation
    theirs = "gelu" if model.config.architecture == "gemma" else "silu"
    if act.name != theirs and Path(args.target).suffix == ".gguf":
        note = f"note: llama.cpp ignores hidden_act {act.name} and would run this file as {theirs}"
        print(note, file=sys.stderr)
    if model.predictors and model.predictors.networks and Path(args.target).suffix == ".gguf":
        note = "note: llama.cpp refuses files with predictors: --no-predictors makes one for it"
        print(note, file=sys.stderr)
    return _report(args, model.size_bytes, seconds)


def _main_for_powerinfer(args: argparse.Namespace, kind: str | None) -> int:
    if args.no_predictors:
        raise ValueError("PowerInfer needs predictors: leave --no-predictors out")
    if args.base or args.adapter:
        raise ValueError("--base and --adapter do not go with --powerinfer: convert twice")
    from prosparse.formats.convert_powerinfer import convert_for_powerinfer

    start = time.monotonic()
    size_bytes, notes = convert_for_powerinfer(
        args.source,
        args.target,
        kind,
        pure=args.pure,
        as_relu=args.as_relu,
        statistics=args.activation_stats,
        vram_budget=args.vram_budget,
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return _report(args, size_bytes, time.monotonic() - start)


def _main_for_adapter(args: argparse.Namespace, kind: str | None) -> int:
    if args.adapter or args.fold or args.pure:
        raise ValueError("an adapter is written of a model as it is: leave --adapter, --fold and --pure out")
    from prosparse.formats.convert_adapter import (
        parse_forms,
        parse_text,
        read_measured,
        write_adapter,
        write_rounded_adapter,
    )

    start = time.monotonic()
    measured = read_measured(args.measured) if args.measured else None
    if text := parse_text(args.size, args.data, args.tokens, args.device):
        if args.rank or args.levels or kind:
            raise ValueError("--size chooses codes itself: leave --rank, --levels and --type out")
        shares: dict[str, float] = {}
        made, notes = write_rounded_adapter(
            args.source,
            args.target,
            args.base,
            int(args.size * 1e6),
            text,
            name=args.name,
            measured=measured,
            progress=lambda line: print(line, file=sys.stderr),
        )
    else:
        ranks, levels, kind_of_factors = parse_forms(args.rank, args.levels, kind)
        made, shares, notes = write_adapter(
            args.source,
            args.target,
            args.base,
            ranks,
            kind_of_factors,
            levels=levels,
            name=args.name,
            measured=measured,
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if shares:
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        print(f"kept of the squared difference: {told}")
    return _report(args, made.size_bytes, time.monotonic() - start, **({"kept": shares} if shares else {}))


def _report(args: argparse.Namespace, size_bytes: int, seconds: float, **more: Any) -> int:
    print(f"{args.target}: {size_bytes / 1e6:.1f} MB of weights in {seconds:.1f} s")
    if args.json:
        result = {"target": str(args.target), "size_bytes": size_bytes, "seconds": round(seconds, 3)}
        print(json.dumps(result | more))
    return 0
