"""A small model and a text to train it on."""

import json

import pytest

from prosparse.formats.hf import write_folder


@pytest.fixture
def folders(tmp_path, tiny_model):
    """A folder with the model `tiny` and `data.jsonl`."""
    write_folder(tmp_path / "tiny", tiny_model(intermediate=256), "F32")
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * 5}] * 40
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path
