"""Perplexity against a direct count, llama-perplexity's chunking, and the verb."""

import math
from dataclasses import replace

import numpy as np
import pytest

from prosparse import cli
from prosparse.engine.engine import LLM
from prosparse.evaluate.perplexity import perplexity

IDS = np.random.default_rng(2).integers(0, 256, 100).tolist()


@pytest.fixture(scope="module")
def llm(tiny_model) -> LLM:
    return LLM(tiny_model(seed=3), backend="naive")


def test_second_halves_of_chunks_that_start_with_bos(llm):
    """Chunks of 16: positions 8..14 predict tokens 9..15, and BOS stands in the first token's place."""
    stream = [256, *IDS]
    losses = []
    for i in range(0, 96, 16):
        chunk = [256, *stream[i + 1 : i + 16]]
        losses += (-llm.logprobs(chunk)[8:]).tolist()
    result = perplexity(llm, IDS, ctx=16)
    assert (result.n_chunks, result.n_tokens, result.ctx) == (6, 6 * 7, 16)
    assert result.nll == pytest.approx(np.mean(losses), abs=1e-5)
    assert result.ppl == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert result.stderr == pytest.approx(result.ppl * error, rel=1e-4)


def test_without_bos(tiny_model):
    model = tiny_model(seed=3)
    metadata = dict(model.tokenizer.gguf) | {"tokenizer.ggml.add_bos_token": False}
    llm = LLM(replace(model, tokenizer=replace(model.tokenizer, gguf=metadata)), backend="naive")
    losses = [-llm.logprobs(IDS[i : i + 10])[5:] for i in range(0, 100, 10)]
    assert perplexity(llm, IDS, ctx=10).nll == pytest.approx(np.mean(losses), abs=1e-5)


def test_first_chunks_and_progress(llm):
    seen = []
    result = perplexity(llm, IDS, 16, 2, lambda *step: seen.append(step))
    assert result.n_chunks == 2
    assert [(i, n) for i, n, _ in seen] == [(1, 2), (2, 2)]
    assert seen[-1][2] == pytest.approx(result.ppl)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[:14], {"ctx": 16}, "15 tokens.* 16"),
        (IDS, {"ctx": 3}, "at least 4"),
        (IDS, {"n_chunks": 0}, "chunks"),
    ],
)
def test_bad_input(llm, ids, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llm, ids, **options)


def test_verb(tiny_model, monkeypatch, capsys, tmp_path):
    import functools
    import json

    import prosparse

    monkeypatch.setattr("prosparse.formats.open_model", lambda path: tiny_model(seed=3, act="relu"))
    monkeypatch.setattr("prosparse.load", functools.partial(prosparse.load, backend="naive"))
    (tmp_path / "text.txt").write_text("some text of no importance " * 8)
    command = [
        "perplexity",
        "-m",
        "x",
        "-f",
        str(tmp_path / "text.txt"),
        "-c",
        "32",
        "--chunks",
        "3",
        "--json",
    ]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["n_chunks"] == 3 and result["n_tokens"] == 45 and result["mode"] == "exact"
    assert "second half of 3 chunks of 32" in out and "±" in out
    assert "chunk 3/3" in err
    assert cli.main(["perplexity", "-m", "x", "-f", str(tmp_path / "text.txt")]) == 2
    assert "one chunk needs 512" in capsys.readouterr().err


def test_smollm2_as_llama_perplexity_counts(smollm2_path):
    """English that the model knows well; the band is wide, the point is that nothing is off by a factor."""
    pytest.importorskip("prosparse._core")
    import this

    import prosparse

    llm = prosparse.load(smollm2_path, n_ctx=64)
    text = "".join(this.d.get(c, c) for c in this.s)
    result = perplexity(llm, llm.tokenizer.encode(text, add_bos=False), 64)
    assert 1.5 < result.ppl < 20
