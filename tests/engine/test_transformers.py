"""The native engine against transformers in float32, on a real model, the same weights and real text."""

from collections.abc import Iterator
from dataclasses import replace
from pydoc_data.topics import topics

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.formats import open_model
from prosparse.model.model import Model
from prosparse.model.tokenizer import Tokenizer
from tiny import stored

pytest.importorskip("prosparse._core")
WINDOW, WINDOWS = 512, 4


@pytest.fixture(scope="module")
def model(smollm2_path) -> Model:
    return open_model(smollm2_path)


@pytest.fixture(scope="module")
def windows(model) -> np.ndarray:
    """int32 [WINDOWS, WINDOW] token ids of Python's own documentation."""
    text = "\n".join(topics[name] for name in sorted(topics))[:30_000]
    ids = Tokenizer.build(model.tokenizer).encode(text)
    return np.array(ids[: WINDOW * WINDOWS], np.int32).reshape(WINDOWS, WINDOW)


def pairs(model: Model, windows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ours, transformers') logits [WINDOW, vocab] of each window."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    llm = LLM(model)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf())).eval()
    weights = {name: torch.from_numpy(tensor.dequantize()) for name, tensor in model.tensors.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    reference.load_state_dict(weights)
    for ids in windows:
        with torch.no_grad():
            theirs = reference(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
        yield llm.forward(ids, all_logits=True), theirs


def test_float32_logits(model, windows):
    tensors = {name: stored(tensor.dequantize(), "F32") for name, tensor in model.tensors.items()}
    for ours, theirs in pairs(replace(model, tensors=tensors), windows[:1]):
        assert np.abs(ours - theirs).max() <= 2e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("type", ["Q8_0", "as in the file"])
def test_quantised_top_1(model, windows, type):
    tensors = dict(model.tensors)
    if type == "Q8_0":
        matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) == 2}
        tensors |= {name: stored(tensor.dequantize(), "Q8_0") for name, tensor in matrices.items()}
    same = [
        ours.argmax(axis=1) == theirs.argmax(axis=1)
        for ours, theirs in pairs(replace(model, tensors=tensors), windows)
    ]
    assert np.mean(same) >= 0.99
