"""Adapter files: a GGUF container of factors, codes and vectors (docs/formats.md). What an adapter is stands
in model/adapter.py."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats.gguf import read_gguf, write_gguf
from prosparse.formats.quants import check_scales, with_type
from prosparse.model.activation import Activation
from prosparse.model.adapter import Adapter, Change, fingerprint
from prosparse.model.coded import Coded
from prosparse.model.factors import Factors
from prosparse.model.model import BLOCKS, Tensor, float32

VERSION = 2
_ENTRY = 128  # bytes of a tensor's name, sizes and alignment in the file
ARCHITECTURE = "prosparse-adapter"
# what holds a matrix's change: its numbers first, then tensors
_FACTORS, _CODED, _COLUMNS = ("scales", "A", "B"), ("coding", "steps", "codes"), "column_steps"
# key -> type of its value
_KEYS = {
    "general.architecture": str,
    "general.type": str,
    "general.name": str,
    "general.license": str,
    "prosparse.adapter.version": int,
    "prosparse.adapter.base": str,
    "prosparse.adapter.sha256": str,
    "prosparse.adapter.measured": str,
    "prosparse.hidden_act": str,
    "prosparse.hidden_act_param": float,
}


def with_types(adapter: Adapter, kind: str) -> Adapter:
    """The adapter with factors of this type, or of F16 where a side is no whole number of its blocks; codes
    stay."""

    def one(tensor: Tensor) -> Tensor:
        made = with_type(tensor, "F16" if tensor.shape[1] % BLOCKS[kind][0] else kind)
        return Tensor(made.type, made.shape, made.data)

    matrices = {
        name: replace(found, a=one(found.a), b=one(found.b)) if isinstance(found, Factors) else found
        for name, found in adapter.matrices.items()
    }
    return replace(adapter, matrices=matrices)


def entries_size(vectors: int, coded: int) -> int:
    """Bytes, roughly, that a file of so many vectors and coded matrices has beside its tensors' data."""
    return _ENTRY * (vectors + (len(_CODED) + 1) * coded)


def write(path: Path, adapter: Adapter) -> None:
    """Write a file. The same adapter gives the same bytes."""
    tensors = dict(adapter.vectors)
    for name, found in adapter.matrices.items():
        if isinstance(found, Factors):
            parts = (float32(np.array([found.scale, found.gain])), found.a, found.b)
        else:
            parts = (float32(np.array([found.scale, found.columns])), found.steps, found.stream)
        names = _FACTORS if isinstance(found, Factors) else _CODED
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": tensor for part, tensor in zip(names, parts, strict=True)}
        if isinstance(found, Coded) and found.column_steps:
            tensors[f"{stem}.{_COLUMNS}"] = found.column_steps
    metadata = {
        "general.architecture": ARCHITECTURE,
        "general.type": "adapter",
        "general.name": adapter.name,
        "general.license": adapter.license,
        "prosparse.adapter.version": VERSION,
        "prosparse.adapter.base": adapter.base,
        "prosparse.adapter.sha256": fingerprint(tensors),
        "prosparse.adapter.measured": json.dumps(adapter.measured, sort_keys=True, allow_nan=False),
        "prosparse.hidden_act": adapter.activation.name,
        "prosparse.hidden_act_param": adapter.activation.param,
    }
    write_gguf(path, metadata, tensors)


def read(path: Path) -> Adapter:
    """Open a file. ValueError for one that is damaged, cut short, of another version or no adapter."""
    file = read_gguf(path)
    try:
        metadata = _checked(file.metadata)
        for name, tensor in file.tensors.items():
            _check_finite(name, tensor)
        if fingerprint(file.tensors) != metadata["prosparse.adapter.sha256"]:
            raise ValueError("tensors are damaged (their checksum differs): get or make the file again")
        matrices, vectors = _parts(dict(file.tensors))
        param = float(str(np.float32(metadata["prosparse.hidden_act_param"])))
        return Adapter(
            metadata["prosparse.adapter.base"],
            Activation.parse(metadata["prosparse.hidden_act"], param),
            matrices,
            vectors,
            metadata["general.name"],
            metadata["general.license"],
            _measured(metadata["prosparse.adapter.measured"]),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def key(path: Path) -> str:
    """In hex, what stands for the model that the adapter makes: of its metadata, which hold the checksums of
    its tensors and of its base. ValueError as in `read`, but the tensors are not looked at."""
    try:
        metadata = _checked(read_gguf(path).metadata)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    return hashlib.sha256(repr(sorted(metadata.items())).encode()).hexdigest()


def _checked(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    if metadata.get("general.architecture") != ARCHITECTURE:
        raise ValueError("this is no adapter: prosparse convert TUNED FILE.gguf --base BASE makes one")
    if (version := metadata.get("prosparse.adapter.version")) != VERSION:
        raise ValueError(f"adapter format {version!r:.20}, and this prosparse knows {VERSION}: make it anew")
    for name in metadata.keys() ^ _KEYS.keys():
        raise ValueError(f"metadata key {name} is {'unknown' if name in metadata else 'missing'}")
    for name, kind in _KEYS.items():
        if type(metadata[name]) is not kind:
            raise ValueError(f"metadata key {name} is {metadata[name]!r:.80}, not a {kind.__name__}")
    return metadata


def _check_finite(name: str, tensor: Tensor) -> None:
    if name.endswith(".codes"):
        return  # any byte
    check_scales(name, tensor)
    if tensor.type in ("F32", "F16", "BF16") and not np.isfinite(tensor.dequantize()).all():
        raise ValueError(f"tensor {name}: NaN or infinite values")


def _measured(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prosparse.adapter.measured is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("prosparse.adapter.measured is not a JSON object")
    return found


def _parts(tensors: dict[str, Tensor]) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """Changes and vectors by the names of the tensors that they change."""
    matrices: dict[str, Change] = {}
    for names in (_FACTORS, _CODED):
        for name in [name for name in tensors if name.endswith(f".{names[0]}")]:
            stem = name.removesuffix(f".{names[0]}")
            for part in names:
                if f"{stem}.{part}" not in tensors:
                    raise ValueError(f"tensor {stem}.{part} is missing")
            parts: list[Any] = [tensors.pop(f"{stem}.{part}") for part in names]
            if names == _CODED:
                parts.append(tensors.pop(f"{stem}.{_COLUMNS}", None))
            try:
                change = _factors(*parts) if names == _FACTORS else _coded(*parts)
            except ValueError as error:
                raise ValueError(f"{stem}: {error}") from None
            if f"{stem}.weight" in matrices:
                raise ValueError(f"{stem} has both factors and codes")
            matrices[f"{stem}.weight"] = change
    for name, tensor in tensors.items():
        if tensor.type != "F32" or len(tensor.shape) != 1 or not name.endswith((".weight", ".bias")):
            raise ValueError(f"tensor {name} ({tensor.type} {tensor.shape}) is no part of an adapter")
    return matrices, tensors


def _factors(scales: Tensor, a: Tensor, b: Tensor) -> Factors:
    scale, gain = _numbers(scales, "scales", 2)
    return Factors(scale, gain, a, b)


def _coded(coding: Tensor, steps: Tensor, codes: Tensor, column_steps: Tensor | None) -> Coded:
    scale, columns = _numbers(coding, "coding", 2)
    if columns != int(columns):
        raise ValueError(f"{columns:g} columns must be a whole number")
    return Coded(scale, int(columns), steps, column_steps, codes)


def _numbers(tensor: Tensor, name: str, count: int) -> list[float]:
    if (tensor.type, tensor.shape) != ("F32", (count,)):
        raise ValueError(f"{name} must be {count} F32, not {tensor.type} {tensor.shape}")
    numbers: list[float] = tensor.dequantize().tolist()
    return numbers
