"""PowerInfer's activation statistics, `activation/activation_N.pt`: how often neurons of layer N were active.

A file is one vector as torch.save writes it: a zip archive with a pickle and the numbers. Neither torch nor
Python's unpickler is used. The pickle's operations are followed here one by one, and any that a vector does
not need is refused: nothing in a file can run code.
"""

import io
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats.files import written_whole

_ROOT = "archive"
_LARGEST_PICKLE = 1 << 16
# torch's storage classes; bfloat16, which numpy lacks, is the upper half of a float32
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
}
_MARK = object()


class _Global(str):
    """A class or function that a pickle names."""


def folder_of(model: Path) -> Path:
    """Where PowerInfer looks for the statistics of a model file."""
    return model.parent / "activation"


def write_activations(folder: Path, counts: np.ndarray) -> None:
    """Write `counts` int64 [layers, d_ff] as one file a layer, each whole or not at all.

    ValueError if the folder holds more layers than that: PowerInfer would take them for this model's.
    """
    names = {f"activation_{layer}.pt" for layer in range(len(counts))}
    if others := sorted({path.name for path in folder.glob("activation_*.pt")} - names):
        raise ValueError(f"{folder / others[0]} is of a model with more layers: move that folder away first")
    for layer, row in enumerate(counts):
        with written_whole(folder / f"activation_{layer}.pt") as file:
            file.write(packed(row))


def packed(values: np.ndarray) -> bytes:
    """A vector as a file that torch.load(weights_only=True) reads, int64."""
    data = np.ascontiguousarray(values, "<i8").tobytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("data.pkl", _pickled(len(values))),
            ("byteorder", b"little"),
            ("data/0", data),
            ("version", b"3\n"),
        ):
            # with a fixed time, so that equal statistics are equal files
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}", (1980, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()


def _pickled(length: int) -> bytes:
    """`torch._utils._rebuild_tensor_v2` of storage 0, offset 0, size (length,) and stride (1,)."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    size = b"J" + struct.pack("<i", length)
    storage = b"(" + text("storage") + b"ctorch\nLongStorage\n" + text("0") + text("cpu") + size + b"tQ"
    rest = b"K\x00" + size + b"\x85" + b"K\x01\x85" + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR."


def read_activations(folder: Path) -> np.ndarray:
    """[layers, d_ff], int64 or float64, of the files activation_0.pt, activation_1.pt, ... of a folder."""
    paths = {path.name: path for path in folder.glob("activation_*.pt")}
    if not paths:
        raise ValueError(f"{folder} holds no activation_0.pt")
    rows = []
    for layer in range(len(paths)):
        if (name := f"activation_{layer}.pt") not in paths:
            raise ValueError(f"{folder} holds {len(paths)} files activation_N.pt, but no {name}")
        rows.append(read_activation(paths[name]))
        if len(rows[-1]) != len(rows[0]):
            raise ValueError(f"{paths[name]} has {len(rows[-1])} neurons, the first layer {len(rows[0])}")
    return np.stack(rows)


def read_activation(path: Path) -> np.ndarray:
    """[d_ff], int64 or float64. ValueError for anything but one vector of finite numbers from 0 on."""
    return unpacked(path.read_bytes(), str(path))


def unpacked(data: bytes, name: str) -> np.ndarray:
    """`read_activation` of a file's bytes; `name` stands in the error messages."""
    try:
        return _unpacked(data)
    except (
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        EOFError,
        KeyError,
        OverflowError,
        struct.error,
        OSError,
    ) as error:
        raise ValueError(f"{name}: not the activation statistics of a layer: {error}") from None


def _unpacked(data: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
            raise ValueError("it is not an archive of torch.save")
        root = pickles[0].filename.removesuffix("data.pkl")

        def content(name: str) -> bytes:
            entry = archive.getinfo(root + name)
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
                raise ValueError(f"{name} is compressed, which torch.save does not do")
            return archive.read(entry)

        if f"{root}byteorder" in archive.namelist() and content("byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        storage, key, count, offset, size, stride = _tensor(content("data.pkl"))
        raw = content(f"data/{key}")
    dtype = np.dtype(_STORAGES[storage])
    if len(raw) != count * dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes are not {count} numbers of a {storage}")
    if size < 1 or offset < 0 or offset + size > count or (stride != 1 and size > 1):
        raise ValueError("the vector lies outside of its numbers")
    values = np.frombuffer(raw, dtype)[offset : offset + size]
    if storage == "BFloat16Storage":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    values = values.astype(np.int64 if values.dtype.kind in "iu" else np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("a frequency is negative, infinite or no number")
    return values


def _tensor(pickle: bytes) -> tuple[str, str, int, int, int, int]:
    """(storage class, key, count, offset, size, stride) of the one vector a pickle describes."""
    match _followed(pickle):
        case (
            "tensor",
            (
                ("storage", _Global() as storage, str(key), str(), int(count)),
                int(offset),
                (int(size),),
                (int(stride),),
                *_,
            ),
        ) if storage.removeprefix("torch ") in _STORAGES:
            return storage.removeprefix("torch "), key, count, offset, size, stride
    raise ValueError("the pickle does not hold one vector of numbers")


def _followed(pickle: bytes) -> Any:
    """What the pickle builds, with tensors as ("tensor", arguments); ValueError for any other operation."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop() -> Any:
        if not stack:
            raise ValueError("the pickle takes more than it has")
        return stack.pop()

    def pop_mark() -> tuple[Any, ...]:
        found: list[Any] = []
        while (value := pop()) is not _MARK:
            found.append(value)
        return tuple(reversed(found))

    for operation, argument, _ in pickletools.genops(pickle):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "GLOBAL":
                stack.append(_Global(argument))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                stack.append(_Global(f"{module} {name}"))
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(pop_mark())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [pop() for _ in range(int(operation.name[-1]))]
                stack.append(tuple(reversed(values)))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "NONE":
                stack.append(None)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                value = pop()
                stack.append(value)
                memo[len(memo) if argument is None else argument] = value
            case "BINGET" | "LONG_BINGET":
                if argument not in memo:
                    raise ValueError("the pickle refers to what it has not stored")
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(pop())
            case "REDUCE":
                arguments, function = pop(), pop()
                if function == "torch._utils _rebuild_tensor_v2":
                    stack.append(("tensor", arguments))
                elif function == "collections OrderedDict" and arguments == ():
                    stack.append({})
                else:
                    # no other value may be shown: tuples of tuples can be endless as text
                    shown = f"{function!r:.80}" if isinstance(function, _Global) else "something"
                    raise ValueError(f"the pickle calls {shown}, which a vector does not need")
            case "STOP":
                value = pop()
                if stack:
                    raise ValueError("the pickle leaves something over")
                return value
            case other:
                raise ValueError(f"the pickle uses {other}, which a vector does not need")
    raise ValueError("the pickle does not end")
