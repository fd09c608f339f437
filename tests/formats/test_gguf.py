"""The GGUF reader against the `gguf` package, hand-made bad files, and the writer's round trip."""

import struct
import time

import numpy as np
import pytest
from fuzz_gguf import open_bytes, seed_file
from hypothesis import given
from hypothesis import strategies as st

from prosparse.formats.gguf import parse, read_gguf, write_gguf
from prosparse.model.model import Tensor

U8, U32, FLOAT, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8


def string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(name="t", dims=(4,), kind=F32, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(pairs=(), entries=(), data=b"", *, magic=b"GGUF", version=3, n_tensors=None, n_keys=None):
    """A file from `pairs` of key and packed (type, value), tensor `entries` and padded `data`."""
    n_tensors = len(entries) if n_tensors is None else n_tensors
    n_keys = len(pairs) if n_keys is None else n_keys
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys)
    head += b"".join(string(key) + value for key, value in pairs) + b"".join(entries)
    return head + bytes(-len(head) % 32) + data


def u32(value):
    return struct.pack("<II", U32, value)


def array(kind, count, payload=b""):
    return struct.pack("<IIQ", ARRAY, kind, count) + payload


def test_hand_made_file():
    data = np.arange(4, dtype=np.float32).tobytes()
    file = parse(gguf([("a", u32(7)), ("b", struct.pack("<I", STRING) + string("é"))], [entry()], data), "f")
    assert file.metadata == {"a": 7, "b": "é"}
    assert file.tensors["t"].dequantize().tolist() == [0, 1, 2, 3]


BAD = {
    "empty": (b"", "magic"),
    "wrong magic": (gguf(magic=b"GGML"), "magic b'GGML'"),
    "powerinfer has no BF16": (gguf([], [entry(kind=30)], bytes(64), magic=b"PWRI"), "t: type 30 is not"),
    "version 1": (gguf(version=1), "version 1"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "tensors 2^63": (gguf(n_tensors=1 << 63), "tensor_count"),
    "keys 2^63": (gguf(n_keys=1 << 63), "metadata_kv_count"),
    "tensors one too many": (gguf([], [entry()], bytes(16), n_tensors=2), "tensor"),
    "key length 2^63": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 63) + bytes(99), "key 0: a string of"),
    "key not utf-8": (gguf([(b"\xff\xfe", u32(1))]), "key 0: a string is not UTF-8"),
    "value not utf-8": (
        gguf([("k", struct.pack("<I", STRING) + string(b"\xc3"))]),
        "k: a string is not UTF-8",
    ),
    "same key twice": (gguf([("k", u32(1)), ("k", u32(1))]), "key k is there twice"),
    "value type": (gguf([("k", struct.pack("<II", 13, 0))]), "k: value type 13"),
    "bool 2": (gguf([("k", struct.pack("<IB", BOOL, 2))]), "k: 2 is not a bool"),
    "bools 2": (gguf([("k", array(BOOL, 2, b"\1\2"))]), "k: a value is not a bool"),
    "array 2^63": (gguf([("k", array(U32, 1 << 63))]), "length of k"),
    "array of bytes 2^63": (gguf([("k", array(U8, 1 << 63))]), "length of k"),
    "strings 2^63": (gguf([("k", array(STRING, 1 << 63))]), "length of k"),
    "array of arrays": (gguf([("k", array(ARRAY, 1, bytes(64)))]), "k: arrays of type 9"),
    "string in array": (gguf([("k", array(STRING, 1, struct.pack("<Q", 1 << 40)))]), "k: a string of"),
    "alignment 0": (gguf([("general.alignment", u32(0))]), "general.alignment"),
    "alignment 24": (gguf([("general.alignment", u32(24))]), "general.alignment"),
    "alignment text": (gguf([("general.alignment", struct.pack("<I", STRING) + string("32"))]), "alignment"),
    "no dimensions": (gguf([], [entry(dims=())], bytes(64)), "tensor t has 0 dimensions"),
    "three dimensions": (gguf([], [entry(dims=(4, 1, 1))], bytes(64)), "tensor t has 3 dimensions"),
    "dimension 0": (gguf([], [entry(dims=(0,))], bytes(64)), "tensor t: shape"),
    "dimensions 2^63": (gguf([], [entry(dims=(1 << 63, 1 << 63))], bytes(64)), "tensor t .* over the end"),
    "type 99": (gguf([], [entry(kind=99)], bytes(64)), "tensor t: type 99"),
    "broken block": (gguf([], [entry(dims=(33,), kind=Q8_0)], bytes(64)), "tensor t: shape"),
    "offset unaligned": (gguf([], [entry(offset=4)], bytes(64)), "offset 4 of tensor t"),
    "offset out of range": (gguf([], [entry(offset=64)], bytes(64)), "tensor t .* over the end"),
    "offset 2^63": (gguf([], [entry(offset=1 << 63)], bytes(64)), "tensor t .* over the end"),
    "overlap": (gguf([], [entry("a", (9,)), entry("b", (4,), offset=32)], bytes(64)), "b overlaps tensor a"),
    "same place": (gguf([], [entry("a"), entry("b")], bytes(64)), "b overlaps tensor a"),
    "same tensor twice": (gguf([], [entry("a"), entry("a", offset=32)], bytes(64)), "a is there twice"),
    "data cut": (gguf([], [entry(dims=(8,))], bytes(31)), "tensor t .* over the end"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case):
    data, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        parse(data, "bad.gguf")
    assert str(error.value).startswith("bad.gguf: ")


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.gguf: the file is empty"):
        read_gguf(tmp_path / "empty.gguf")
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "missing.gguf")


def test_messages_carry_no_control_characters():
    with pytest.raises(ValueError) as error:
        parse(gguf([("\x1b[2J" + "x" * 5000, struct.pack("<I", 99))]), "f")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_truncation_at_every_byte():
    whole = seed_file()
    open_bytes(whole)
    # up to the last tensor's data, whose padding may be missing
    end = len(whole.rstrip(b"\0"))
    for size in range(end):
        with pytest.raises(ValueError, match="cut"):
            parse(whole[:size], "cut")


def test_every_value_type_survives(tmp_path):
    metadata = {
        "int": 1,
        "negative": -1,
        "big": 1 << 40,
        "big negative": -(1 << 40),
        "float": 0.5,
        "true": True,
        "text": "日本語",
        "texts": ["", "a", "\n"],
        "no texts": [],
        "ints": [1, -2],
        "big ints": [1 << 40, -1],
        "floats": [0.5, 1.5],
        "bools": np.array([True, False]),
        **{
            kind: np.array([1, 2], kind)
            for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
        },
    }
    write_gguf(tmp_path / "m.gguf", metadata, {})
    read = read_gguf(tmp_path / "m.gguf").metadata
    assert list(read) == list(metadata)
    for key, value in metadata.items():
        if isinstance(value, np.ndarray):
            assert read[key].dtype == value.dtype
        assert type(read[key]) is type(value) or isinstance(read[key], np.ndarray)
        assert np.array_equal(read[key], value), key


@pytest.mark.parametrize(
    "value", [None, {}, 1 << 64, 1e300, [1, "a"], [[1]], [1 << 64], np.zeros((2, 2)), b"bytes"]
)
def test_values_without_a_gguf_form_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="key"):
        write_gguf(tmp_path / "m.gguf", {"key": value}, {})
    assert not list(tmp_path.iterdir())


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20),
        st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats(width=32, allow_nan=False)
        | st.text()
        | st.lists(st.text(), min_size=1),
    ),
    st.dictionaries(st.text(min_size=1), st.tuples(st.integers(1, 5), st.integers(1, 5))),
)
def test_write_then_read(tmp_path_factory, metadata, shapes):
    metadata.pop("general.alignment", None)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    rng = np.random.default_rng(0)
    tensors = {
        name: Tensor("F32", shape, rng.standard_normal(shape, np.float32).view(np.uint8))
        for name, shape in shapes.items()
    }
    write_gguf(path, metadata, tensors)
    file = read_gguf(path)
    assert file.metadata == metadata
    assert list(file.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(file.tensors[name].data, tensor.data)


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("disk full")

    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write_gguf(tmp_path / "m.gguf", {}, {"t": Tensor("F32", (4,), fail)})
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"old"


def same_as_package(path):
    """Compare our reading of a file with the `gguf` package's."""
    from gguf import GGUFReader

    ours, theirs = read_gguf(path), GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for name, field in fields.items():
        assert np.array_equal(ours.metadata[name], field.contents()), name
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.type, mine.shape) == (tensor.tensor_type.name, tuple(map(int, tensor.shape[::-1])))
        assert np.array_equal(mine.data.ravel(), tensor.data.view(np.uint8).ravel()), tensor.name


def test_real_file_equals_the_gguf_package(smollm2_path):
    same_as_package(smollm2_path)


def test_what_we_write_equals_the_gguf_package(tmp_path):
    (tmp_path / "seed.gguf").write_bytes(seed_file())
    same_as_package(tmp_path / "seed.gguf")


def test_a_49k_vocabulary_is_read_quickly(smollm2_path):
    read_gguf(smollm2_path)
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        read_gguf(smollm2_path)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.15


def write_parts(folder, count, change=None):
    """A split file of `count` parts, one tensor in each; `change` may damage the metadata of part 1."""
    for i in range(count):
        metadata = {"split.no": i, "split.count": count, "split.tensors.count": count}
        if i == 0:
            metadata["general.name"] = "whole"
        if i == 1 and change:
            metadata |= change
        data = np.full(4, i, np.float32).view(np.uint8)
        path = folder / f"m-{i + 1:05d}-of-{count:05d}.gguf"
        write_gguf(path, metadata, {f"t{i}": Tensor("F32", (4,), data)})
    return folder / f"m-00001-of-{count:05d}.gguf"


def test_split_files(tmp_path):
    first = write_parts(tmp_path, 3)
    for path in (first, tmp_path / "m-00003-of-00003.gguf"):
        file = read_gguf(path)
        assert file.metadata["general.name"] == "whole"
        assert [int(t.dequantize()[0]) for t in file.tensors.values()] == [0, 1, 2]


def test_bad_split_files(tmp_path):
    first = write_parts(tmp_path, 3)
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"must end in -00001-of-00003\.gguf"):
        read_gguf(renamed)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf: this part"):
        read_gguf(first)
    with pytest.raises(ValueError, match=r"split\.no"):
        read_gguf(write_parts(tmp_path, 3, {"split.no": 2}))
    (tmp_path / "m-00002-of-00003.gguf").write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    with pytest.raises(ValueError, match=r"split\.no"):
        read_gguf(first)
    first = write_parts(tmp_path, 2)
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1, "split.count": 2}, {})
    with pytest.raises(ValueError, match=r"split\.tensors\.count"):
        read_gguf(first)
