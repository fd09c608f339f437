"""The built-in models: the sparse one is made once, whole, by one process, and made again when damaged."""

import os
import subprocess
import sys

import numpy as np
import pytest

from prosparse.formats import adapter as files
from prosparse.formats import builtin, open_model
from prosparse.formats.convert import write_model
from prosparse.model.activation import Activation
from prosparse.model.adapter import apply, extract

NAME = "model.layers.0.mlp.up_proj.weight"
# makes the model of the adapter and original that are given
CHILD = """
import sys
from pathlib import Path
from prosparse.formats import builtin
print(builtin.cached(Path(sys.argv[1]), lambda: Path(sys.argv[2])))
"""


@pytest.fixture
def places(tiny_model, tmp_path, monkeypatch):
    """(adapter, original) as files; they are the built-in ones, and the cache is a folder yet to be made."""
    base = tiny_model(type="Q4_1", hidden=64, intermediate=96)
    write_model(tmp_path / "original.gguf", base)
    tuned = tiny_model(type="Q8_0", hidden=64, intermediate=96, seed=1, act="fatrelu", act_param=0.5)
    files.write(tmp_path / "adapter.gguf", extract(base, tuned, 8))
    monkeypatch.setattr(builtin, "ADAPTER", tmp_path / "adapter.gguf")
    monkeypatch.setattr(builtin, "original_path", lambda: tmp_path / "original.gguf")
    monkeypatch.setenv("PROSPARSE_CACHE", str(tmp_path / "cache" / "deep"))
    return tmp_path / "adapter.gguf", tmp_path / "original.gguf"


def test_demo_is_made_once(places, capsys, monkeypatch):
    model = open_model("demo")
    assert model.config.activation == Activation("fatrelu", 0.5)
    expected = apply(open_model("demo-original"), files.read(places[0])).tensors[NAME].dequantize()
    assert model.tensors[NAME].type == "Q8_0"
    assert np.abs(model.tensors[NAME].dequantize() - expected).max() < 0.01 * np.abs(expected).max()
    assert "making the built-in sparse model, once" in capsys.readouterr().err
    path = builtin.demo_path()
    made = path.stat()

    def not_needed():
        raise AssertionError("a model that is there needs no original")

    monkeypatch.setattr(builtin, "original_path", not_needed)
    assert builtin.demo_path() == path and path.stat() == made
    assert capsys.readouterr() == ("", "")
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".gguf", ".json", ".lock"]


def damage(path, whole):
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse


@pytest.mark.parametrize(
    "change",
    [
        lambda path, whole: path.write_bytes(whole[:-1]),
        lambda path, whole: path.write_bytes(b""),
        damage,
        lambda path, whole: path.unlink(),
        lambda path, whole: path.with_suffix(".json").unlink(),
        lambda path, whole: path.with_suffix(".json").write_bytes(b"{"),
        lambda path, whole: path.with_suffix(".json").write_bytes(b"[]"),
    ],
    ids=["cut", "empty", "damaged", "removed", "no note", "half a note", "no object"],
)
def test_what_is_not_whole_is_made_again(places, capsys, change):
    path = builtin.demo_path()
    whole = path.read_bytes()
    change(path, whole)
    capsys.readouterr()
    assert builtin.demo_path().read_bytes() == whole
    assert "making" in capsys.readouterr().err
    assert builtin.demo_path() == path and not capsys.readouterr().err


def test_a_copy_with_another_time_is_good(places, capsys):
    path = builtin.demo_path()
    os.utime(path, ns=(1, 1))
    capsys.readouterr()
    assert builtin.demo_path() == path and not capsys.readouterr().err


def test_another_adapter_is_another_file(places):
    first = builtin.demo_path()
    made = files.read(places[0])
    files.write(places[0], files.with_types(made, "Q8_0"))
    second = builtin.demo_path()
    assert first != second and first.exists()


def test_two_processes_at_once(places):
    command = [sys.executable, "-c", CHILD, *map(str, places)]
    runs = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] == f"{builtin.demo_path()}\n"
    assert "".join(err for _, err in outputs).count("making") == 1


def test_a_cache_that_cannot_be_written(places, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PROSPARSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="set PROSPARSE_CACHE to a folder"):
        open_model("demo")


def test_a_full_disk(places, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prosparse.formats.convert.convert", full)
    with pytest.raises(ValueError, match=r"No space left on device.*PROSPARSE_CACHE"):
        open_model("demo")


def test_without_the_adapter(places):
    places[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.gguf is not in this installation"):
        open_model("demo")
    assert open_model("demo-original").config.activation.name == "silu"


def test_the_wrong_original(places, tiny_model):
    write_model(places[1], tiny_model(type="Q4_1", hidden=64, intermediate=96, seed=5))
    with pytest.raises(ValueError, match=r"fingerprint.*pip install"):
        open_model("demo")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("PROSPARSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert builtin.cache_folder() == tmp_path / "xdg" / "prosparse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert builtin.cache_folder() == tmp_path / ".cache" / "prosparse"
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without a home
    with pytest.raises(ValueError, match="Set PROSPARSE_CACHE"):
        builtin.cache_folder()


def test_the_adapter_that_is_shipped(smollm2_path):
    assert builtin.ADAPTER.stat().st_size <= 20e6
    assert apply(open_model(smollm2_path), files.read(builtin.ADAPTER)).config.activation.sparse
