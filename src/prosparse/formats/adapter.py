"""Adapter files: a GGUF container of factors and vectors (docs/formats.md). What an adapter is stands in
model/adapter.py."""

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
from prosparse.model.adapter import Adapter, Factors, fingerprint
from prosparse.model.model import BLOCKS, Tensor

VERSION = 1
ARCHITECTURE = "prosparse-adapter"
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
    """The adapter with factors of this type, or of F16 where a side is no whole number of its blocks."""

    def one(tensor: Tensor) -> Tensor:
        made = with_type(tensor, "F16" if tensor.shape[1] % BLOCKS[kind][0] else kind)
        return Tensor(made.type, made.shape, made.data)

    matrices = {name: replace(f, a=one(f.a), b=one(f.b)) for name, f in adapter.matrices.items()}
    return replace(adapter, matrices=matrices)


def write(path: Path, adapter: Adapter) -> None:
    """Write a file. The same adapter gives the same bytes."""
    tensors = dict(adapter.vectors)
    for name, factors in adapter.matrices.items():
        stem = name.removesuffix(".weight")
        scales = np.array([factors.scale, factors.gain], np.float32)
        tensors[f"{stem}.scales"] = Tensor("F32", (2,), scales.view(np.uint8))
        tensors |= {f"{stem}.A": factors.a, f"{stem}.B": factors.b}
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
        raise ValueError(
            f"adapter format {version!r:.20}, and this prosparse knows {VERSION}: take a newer one"
        )
    for name in metadata.keys() ^ _KEYS.keys():
        raise ValueError(f"metadata key {name} is {'unknown' if name in metadata else 'missing'}")
    for name, kind in _KEYS.items():
        if type(metadata[name]) is not kind:
            raise ValueError(f"metadata key {name} is {metadata[name]!r:.80}, not a {kind.__name__}")
    return metadata


def _check_finite(name: str, tensor: Tensor) -> None:
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


def _parts(tensors: dict[str, Tensor]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors and vectors by the names of the tensors that they change."""
    matrices = {}
    for name in [name for name in tensors if name.endswith(".scales")]:
        stem = name.removesuffix(".scales")
        for part in ("A", "B"):
            if f"{stem}.{part}" not in tensors:
                raise ValueError(f"tensor {stem}.{part} is missing")
        scales, a, b = (tensors.pop(f"{stem}.{part}") for part in ("scales", "A", "B"))
        if (scales.type, scales.shape) != ("F32", (2,)):
            raise ValueError(f"tensor {name} must be two F32, not {scales.type} {scales.shape}")
        scale, gain = scales.dequantize().tolist()
        try:
            matrices[f"{stem}.weight"] = Factors(scale, gain, a, b)
        except ValueError as error:
            raise ValueError(f"{stem}: {error}") from None
    for name, tensor in tensors.items():
        if tensor.type != "F32" or len(tensor.shape) != 1 or not name.endswith((".weight", ".bias")):
            raise ValueError(f"tensor {name} ({tensor.type} {tensor.shape}) is no part of an adapter")
    return matrices, tensors
