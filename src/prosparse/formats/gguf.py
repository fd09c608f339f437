"""GGUF files: a strict reader over a memory map, and a streaming writer.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. PowerInfer's, with the magic PWRI, is the
same with the type numbers of November 2023. Every count, length and offset is checked against the file size
before it is used; anything wrong is a ValueError that names the field.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats.files import written_whole
from prosparse.formats.quants import TYPE_IDS, TYPE_NAMES
from prosparse.model.model import SIZES, Tensor

MAGIC, POWERINFER_MAGIC = b"GGUF", b"PWRI"
_ALIGNMENT = 32
_BOOL, _STRING, _ARRAY = 7, 8, 9
# value type id -> struct and numpy code; a bool is read as a byte and must be 0 or 1
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {kind: struct.Struct(f"<{code}") for kind, code in _CODES.items()}
_DTYPES = {kind: np.dtype(f"<{code}") for kind, code in _CODES.items()}
_U32, _U64 = 4, 10
# the type of a Python int, by its range: UINT32, INT32, UINT64, INT64
_INT_RANGES = ((_U32, 0, 2**32), (5, -(2**31), 0), (_U64, 0, 2**64), (11, -(2**63), 0))
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

_NUMBERS = TYPE_IDS | {"I8": 24}
_NAMES = {number: name for name, number in _NUMBERS.items()}
# 16 to 18 are integers for PowerInfer, and other types in the GGUF of today
_POWERINFER_TYPES = {number: name for number, name in TYPE_NAMES.items() if number < 16}
INDEX_TYPES = {18: "I32"}  # of PowerInfer's placement files
_SIZES = SIZES | {"I32": (1, 4)}

Buffer = bytes | mmap.mmap


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A parsed file: values are int, float, bool, str, list[str] or numpy vectors, names are GGUF's."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    version: int
    powerinfer: bool = False  # whether the magic is PWRI


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor's data stands in a file: `shape` in numpy order, `start` and `nbytes` in bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the data as bytes: (rows, row bytes) or (row bytes,)."""
        block, size = _SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // block * size)


def read_gguf(path: Path) -> GGUFFile:
    """Read a GGUF file; given any part of a split one (`-00001-of-00003.gguf`), read all parts."""
    match = _SPLIT.search(path.name)
    first = _read_file(path)
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return first
    if not match or int(match[2]) != count:
        raise ValueError(
            f"{path}: split.count is {count}, so the name must end in -00001-of-{count:05d}.gguf, as written"
        )
    metadata: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for number in range(count):
        part_path = path.with_name(f"{path.name[: match.start()]}-{number + 1:05d}-of-{count:05d}.gguf")
        if not part_path.is_file():
            raise ValueError(f"{part_path}: this part of the split file is missing")
        part = _read_file(part_path)
        if part.metadata.get("split.no") != number or part.metadata.get("split.count") != count:
            raise ValueError(f"{part_path}: split.no or split.count does not fit its name")
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{part_path}: tensor {min(twice)} is in another part too")
        metadata = part.metadata | metadata  # type: ignore[operator]
        tensors |= part.tensors
    if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise ValueError(f"{path}: split.tensors.count does not equal the {len(tensors)} tensors found")
    return GGUFFile(metadata, tensors, first.version, first.powerinfer)


def _read_file(path: Path) -> GGUFFile:
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise ValueError(f"{path}: the file is empty")
        return parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))


def is_powerinfer(buffer: Buffer) -> bool:
    """Whether a file starts with PowerInfer's magic."""
    return buffer[:4] == POWERINFER_MAGIC


def parse(buffer: Buffer, name: str) -> GGUFFile:
    """Parse the bytes of one file; tensors are views of them. `name` stands in the error messages."""
    powerinfer = is_powerinfer(buffer)
    metadata, entries, version = parse_header(buffer, name, _POWERINFER_TYPES if powerinfer else _NAMES)
    tensors = {}
    for entry in entries:
        data = np.frombuffer(buffer, np.uint8, entry.nbytes, entry.start).reshape(entry.data_shape)
        tensors[entry.name] = Tensor(entry.type, entry.shape, data)
    return GGUFFile(metadata, tensors, version, powerinfer)


def parse_header(
    buffer: Buffer, name: str, types: Mapping[int, str]
) -> tuple[dict[str, Any], list[Entry], int]:
    """(metadata, tensors in their order in the file, version); `types` are the numbers that may occur."""
    reader = _Reader(buffer, name, types)
    magic = buffer[:4]
    if magic not in (MAGIC, POWERINFER_MAGIC):
        raise reader.error(f"magic {bytes(magic)!r} is not {MAGIC!r}: not a GGUF file")
    reader.position = 4
    version = reader.scalar(_U32, "version")
    if version not in (2, 3):
        hint = "big-endian" if version in (2 << 24, 3 << 24) else "convert the model again"
        raise reader.error(f"version {version} is not supported, 2 and 3 are ({hint})")
    n_tensors = reader.count("tensor_count", 24)  # the least a tensor's header entry takes, without its name
    n_keys = reader.count("metadata_kv_count", 12)
    metadata: dict[str, Any] = {}
    for i in range(n_keys):
        key = reader.string(f"key {i}")
        if key in metadata:
            raise reader.error(f"key {key} is there twice")
        metadata[key] = reader.value(reader.scalar(_U32, f"type of {key}"), key)
    entries = [reader.tensor_entry(i) for i in range(n_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise reader.error(f"general.alignment {alignment!r:.80} is not a power of two from 8 to 65536")
    start = reader.position + -reader.position % alignment
    placed: dict[str, Entry] = {}
    end, before = 0, ""
    # an empty list starts where the next tensor does
    for offset, tensor_name, kind, shape in sorted(entries, key=lambda e: (e[0], math.prod(e[3]), e[1])):
        if tensor_name in placed:
            raise reader.error(f"tensor {tensor_name} is there twice")
        if offset % alignment:
            raise reader.error(f"offset {offset} of tensor {tensor_name} is not a multiple of {alignment}")
        if offset < end:
            raise reader.error(f"tensor {tensor_name} overlaps tensor {before}")
        size = math.prod(shape) // _SIZES[kind][0] * _SIZES[kind][1]
        end, before = offset + size, tensor_name
        if start + end > reader.size:
            raise reader.error(
                f"tensor {tensor_name} (offset {offset}, {size} bytes) runs over the end of the file"
            )
        placed[tensor_name] = Entry(tensor_name, kind, shape, start + offset, size)
    return metadata, [placed[tensor_name] for _, tensor_name, _, _ in entries], version


class _Reader:
    """A position in a buffer, and reads that check it."""

    def __init__(self, buffer: Buffer, name: str, types: Mapping[int, str]) -> None:
        self.buffer, self.name, self.types = buffer, name, types
        self.size, self.position = len(buffer), 0

    def error(self, message: str) -> ValueError:
        # names come from the file: neither control characters nor a flood may reach a terminal
        printable = "".join(c if c.isprintable() else "?" for c in message[:300])
        return ValueError(f"{self.name}: {printable}")

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.position:
            raise self.error(f"{what}: the file ends inside it (truncated?)")

    def scalar(self, kind: int, what: str) -> Any:
        code = _STRUCTS[kind]
        self.need(code.size, what)
        (value,) = code.unpack_from(self.buffer, self.position)
        self.position += code.size
        if kind == _BOOL:
            if value > 1:
                raise self.error(f"{what}: {value} is not a bool")
            return bool(value)
        return value

    def count(self, what: str, least_size: int) -> int:
        """A u64 count of things that take at least `least_size` bytes each."""
        count: int = self.scalar(_U64, what)
        if count > (self.size - self.position) // least_size:
            raise self.error(f"{what} {count} does not fit into a file of {self.size} bytes")
        return count

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        # one loop without calls: a vocabulary has 100,000 strings
        buffer, position, size = self.buffer, self.position, self.size
        length_at = _STRUCTS[_U64].unpack_from
        found = []
        try:
            for _ in range(count):
                (length,) = length_at(buffer, position)
                position += 8
                end = position + length
                if end > size:
                    raise self.error(f"{what}: a string of {length} bytes runs over the end of the file")
                found.append(buffer[position:end].decode())
                position = end
        except struct.error:
            raise self.error(f"{what}: the file ends inside it (truncated?)") from None
        except UnicodeDecodeError:
            raise self.error(f"{what}: a string is not UTF-8") from None
        self.position = position
        return found

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind in _STRUCTS:
            return self.scalar(kind, key)
        if kind != _ARRAY:
            raise self.error(f"{key}: value type {kind} does not exist")
        kind = self.scalar(_U32, f"array type of {key}")
        if kind == _STRING:
            return self.strings(self.count(f"length of {key}", 8), key)
        if kind not in _DTYPES:
            raise self.error(f"{key}: arrays of type {kind} are not supported")
        dtype = _DTYPES[kind]
        count = self.count(f"length of {key}", dtype.itemsize)
        values = np.frombuffer(self.buffer, dtype, count, self.position).copy()
        self.position += values.nbytes
        if kind == _BOOL:
            if (values > 1).any():
                raise self.error(f"{key}: a value is not a bool")
            return values.astype(bool)
        return values

    def tensor_entry(self, i: int) -> tuple[int, str, str, tuple[int, ...]]:
        """(offset, name, type, shape in numpy order) of one tensor."""
        name = self.string(f"name of tensor {i}")
        n_dims = self.scalar(_U32, f"dimensions of tensor {name}")
        if n_dims not in (1, 2):
            raise self.error(f"tensor {name} has {n_dims} dimensions: 1 and 2 are supported")
        shape = tuple(self.scalar(_U64, f"shape of tensor {name}") for _ in range(n_dims))[::-1]
        number = self.scalar(_U32, f"type of tensor {name}")
        if number not in self.types:
            known = ", ".join(self.types.values())
            raise self.error(f"tensor {name}: type {number} is not supported: {known} are")
        kind = self.types[number]
        least = 0 if kind == "I32" else 1  # a list of neurons may be empty
        if min(shape) < least or shape[-1] % _SIZES[kind][0]:
            raise self.error(f"tensor {name}: shape {shape} does not fit type {kind}")
        return self.scalar(_U64, f"offset of tensor {name}"), name, kind, shape


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], magic: bytes = MAGIC
) -> None:
    """Write a GGUF v3 file, one tensor in memory at a time; it appears under its name only when complete.

    Python ints become UINT32 where they fit, floats FLOAT32, numpy numbers and vectors keep their type.
    """

    def data(tensor: Tensor) -> Callable[[], np.ndarray]:
        return lambda: tensor.data

    parts = [(name, t.shape, _NUMBERS[t.type], t.nbytes, data(t)) for name, t in tensors.items()]
    write_parts(path, metadata, parts, magic)


def write_parts(
    path: Path,
    metadata: Mapping[str, Any],
    parts: Iterable[tuple[str, tuple[int, ...], int, int, Callable[[], np.ndarray]]],
    magic: bytes,
) -> None:
    """Write a file of tensors given as (name, shape, number of the type, bytes, what makes the data)."""
    parts = list(parts)
    header = [magic, struct.pack("<IQQ", 3, len(parts), len(metadata))]
    for key, value in metadata.items():
        header += [_packed_string(key), _packed(key, value)]
    offset = 0
    for name, shape, number, nbytes, _ in parts:
        header += [
            _packed_string(name),
            struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset),
        ]
        offset += nbytes + -nbytes % _ALIGNMENT
    packed = b"".join(header)
    with written_whole(path) as file:
        file.write(packed + bytes(-len(packed) % _ALIGNMENT))
        for _, _, _, nbytes, data in parts:
            file.write(data().data)
            file.write(bytes(-nbytes % _ALIGNMENT))


def _packed_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(key: str, value: Any) -> bytes:
    """A value with its type."""
    match value:
        case bool():
            return struct.pack("<IB", _BOOL, value)
        case str():
            return struct.pack("<I", _STRING) + _packed_string(value)
        case int():
            kind = next((k for k, low, high in _INT_RANGES if low <= value < high), None)
            if kind is None:
                raise ValueError(f"{key}: {value} does not fit into 64 bits")
            return struct.pack("<I", kind) + _STRUCTS[kind].pack(value)
        case float():
            if abs(value) > float(np.finfo(np.float32).max) and math.isfinite(value):
                raise ValueError(f"{key}: {value} does not fit into 32 bits")
            return struct.pack("<If", 6, value)
        case list() | tuple() if all(isinstance(v, str) for v in value):
            strings = b"".join(_packed_string(v) for v in value)
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + strings
        case list() | tuple():
            value = np.array(value)
            if value.dtype == np.int64 and np.abs(value).max() < 2**31:
                value = value.astype(np.int32)
            elif value.dtype == np.float64:
                value = value.astype(np.float32)
    kinds = {dtype: kind for kind, dtype in _DTYPES.items() if kind != _BOOL} | {np.dtype(bool): _BOOL}
    if isinstance(value, np.generic) and value.dtype in kinds:
        return struct.pack("<I", kinds[value.dtype]) + value.tobytes()
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        raise ValueError(f"{key}: {type(value).__name__} has no GGUF form")
    if value.dtype not in kinds:
        raise ValueError(f"{key}: an array of {value.dtype} has no GGUF form")
    return struct.pack("<IIQ", _ARRAY, kinds[value.dtype], len(value)) + value.tobytes()
