"""The safetensors reader against the safetensors package, and bad files."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse.formats.safetensors import parse, read_safetensors, write_safetensors
from prosparse.model.model import Tensor


def packed(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"t": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more}


BAD = {
    "header 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "header length"),
    "header too long": (struct.pack("<Q", 100) + b"{}", "header length"),
    "not JSON": (packed(b"{'a'"), "not valid JSON"),
    "not UTF-8": (packed(b'{"\xff":1}'), "not valid JSON"),
    "deep": (packed(b"[" * 100_000), "not valid JSON"),
    "list": (packed([1]), "not a JSON object"),
    "twice": (packed(b'{"a":1,"a":2}'), "twice"),
    "entry": (packed({"t": 3}), "tensor t: the header entry"),
    "more keys": (packed(one(x=1), bytes(8)), "tensor t: the header entry"),
    "dtype": (packed(one(dtype="I64"), bytes(8)), "tensor t: dtype 'I64'"),
    "dtype list": (packed(one(dtype=[1]), bytes(8)), "tensor t: dtype"),
    "negative shape": (packed(one(shape=(-2,)), bytes(8)), "tensor t: shape"),
    "shape text": (packed(one(shape=("2",)), bytes(8)), "tensor t: shape"),
    "shape bool": (packed(one(shape=(True,)), bytes(8)), "tensor t: shape"),
    "huge shape": (packed(one(shape=(1 << 62, 1 << 62)), bytes(8)), "do not fit"),
    "three sizes": (packed(one(shape=(1, 1, 2)), bytes(8)), "vector or matrix"),
    "no sizes": (packed(one(shape=(), offsets=(0, 4)), bytes(8)), "vector or matrix"),
    "short": (packed(one(), bytes(7)), "over the end"),
    "offsets": (packed(one(offsets=(8, 0)), bytes(8)), "not a range"),
    "one offset": (packed(one(offsets=(8,)), bytes(8)), "not a range"),
    "size": (packed(one(offsets=(0, 4)), bytes(8)), "do not fit"),
    "overlap": (packed(one() | {"u": one(offsets=(4, 12))["t"]}, bytes(12)), "u overlaps tensor t"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case):
    data, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        parse(data, "bad")
    assert str(error.value).startswith("bad: ")


def test_truncation_at_every_byte(tmp_path):
    whole = packed(one() | {"u": one(offsets=(8, 16))["t"]}, bytes(16))
    for size in range(len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut"):
            read_safetensors(path)


@given(st.binary(max_size=200))
def test_any_header_opens_or_is_refused(header):
    try:
        parse(packed(header, bytes(64)), "any")
    except ValueError as error:
        assert str(error).startswith("any: ")


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_equal_to_the_package(tmp_path, kind):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    theirs = {"a": torch.randn(3, 5).to(getattr(torch, kind)), "b": torch.randn(7).to(getattr(torch, kind))}
    save_file(theirs, tmp_path / "theirs.safetensors")
    ours = read_safetensors(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert np.array_equal(tensor.dequantize(), theirs[name].float().numpy())
    write_safetensors(tmp_path / "ours.safetensors", ours)
    for name, tensor in load_file(tmp_path / "ours.safetensors").items():
        assert torch.equal(tensor, theirs[name]), name


def test_quantised_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no type Q8_0"):
        write_safetensors(tmp_path / "m", {"t": Tensor("Q8_0", (32,), np.zeros(34, np.uint8))})
