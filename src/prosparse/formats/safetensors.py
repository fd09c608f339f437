"""safetensors files: a strict zero-copy reader, and a streaming writer.

Format: https://huggingface.co/docs/safetensors. A u64 header length, a JSON header, the data.
"""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats.files import written_whole
from prosparse.model.model import BLOCKS, Tensor

TYPES = ("F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # the limit of the reference implementation


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The F32, F16 and BF16 tensors of a file, as views of its memory map."""
    with path.open("rb") as file:
        if file.seek(0, 2) < 8:
            raise ValueError(f"{path}: the file is too short for a safetensors header")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parse(buffer, str(path))


def parse(buffer: bytes | mmap.mmap, name: str) -> dict[str, Tensor]:
    """Parse the bytes of one file. ValueError, starting with `name`, for anything that does not fit."""
    (length,) = struct.unpack_from("<Q", buffer)
    start = 8 + length
    if length > _MAX_HEADER or start > len(buffer):
        raise ValueError(f"{name}: header length {length} does not fit into a file of {len(buffer)} bytes")
    try:
        header = json.loads(buffer[8:start], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{name}: the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    ranges = []
    for tensor_name, entry in header.items():
        kind, shape, begin, end = _entry(name, tensor_name, entry)
        if end > len(buffer) - start:
            raise ValueError(f"{name}: tensor {tensor_name} runs over the end of the file (truncated?)")
        if end - begin != math.prod(shape) * BLOCKS[kind][1]:
            raise ValueError(f"{name}: data_offsets of tensor {tensor_name} do not fit {kind} {list(shape)}")
        ranges.append((begin, end, tensor_name))
        data = np.frombuffer(buffer, np.uint8, end - begin, start + begin)
        tensors[tensor_name] = Tensor(kind, shape, data.reshape(*shape[:-1], -1))
    ranges.sort()
    for (_, end, first), (begin, _, second) in pairwise(ranges):
        if begin < end:
            raise ValueError(f"{name}: tensor {second} overlaps tensor {first}")
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _entry(name: str, tensor_name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, begin, end) of one header entry."""
    where = f"{name}: tensor {tensor_name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: the header entry must have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in TYPES:
        raise ValueError(f"{where}: dtype {kind!r:.80} is not supported: {', '.join(TYPES)} are")
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
            raise ValueError(f"{where}: {field} {value!r:.80} is not a list of sizes")
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(f"{where}: shape {shape} is not that of a vector or matrix")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets {offsets!r:.80} are not a range")
    return kind, tuple(shape), offsets[0], offsets[1]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float tensors, one in memory at a time; the file appears only when complete."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.type not in TYPES:
            raise ValueError(f"tensor {name}: safetensors has no type {tensor.type}")
        header[name] = {
            "dtype": tensor.type,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)  # keeps the data aligned
    with written_whole(path) as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        for tensor in tensors.values():
            file.write(tensor.data.data)
