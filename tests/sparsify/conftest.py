"""A small model and a text to train it on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from prosparse.formats.hf import write_folder


@pytest.fixture(scope="module")
def mixture():
    """The alphabet again and again, in sequences of 32."""
    from prosparse.sparsify.batches import Mixture

    tokens = np.tile(np.arange(97, 123, dtype=np.uint32), 400)
    store = SimpleNamespace(
        tokens=tokens,
        loss=np.ones(len(tokens), np.uint8),
        offsets=np.arange(0, len(tokens) + 1, 26),
        source="alphabet",
    )
    return Mixture([store], [1.0], context=32, seed=0, vocab_size=288)


@pytest.fixture
def folders(tmp_path, tiny_model):
    """A folder with the model `tiny` and `data.jsonl`."""
    write_folder(tmp_path / "tiny", tiny_model(intermediate=256), "F32")
    rows = [{"text": "the quick brown fox jumps over the lazy dog " * 5}] * 40
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path
