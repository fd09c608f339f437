"""Token stores: what is written, what is learnt, and that nothing half-written is ever found."""

import json

import numpy as np
import pytest

from prosparse.model.chat import CHATML
from prosparse.sparsify import tokens
from prosparse.sparsify.tokens import Encoder, TokenStore, build
from tiny import byte_tokenizer

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ok."},
]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(byte_tokenizer(288), bos_id=BOS, eos_ids=(EOS,), chat_template=CHATML)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.jsonl"
    texts = [f"document {i} " + "x" * (i % 17) for i in range(150)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def test_documents_end_with_eos(encoder):
    ids, loss = encoder.encode("ab")
    assert ids.tolist() == [BOS, ord("a"), ord("b"), EOS]
    assert loss.all()


def test_only_answers_are_learnt(encoder):
    ids, loss = encoder.encode(MESSAGES)
    text = encoder.tokenizer.decode(ids, special=True)
    assert text == "<s>" + "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES)
    learnt = encoder.tokenizer.decode(ids[loss == 1], special=True)
    assert learnt == "Yes?<|im_end|>\nOk.<|im_end|>\n"


def test_the_prompt_of_training_is_that_of_inference(encoder, tiny_model):
    from prosparse.engine.engine import LLM

    llm = LLM(tiny_model(), backend="naive")  # the same tokenizer; no template, so ChatML
    ids, loss = encoder.encode(MESSAGES[:2])
    prompt = llm.chat_ids(MESSAGES[:1])
    assert ids[: len(prompt)].tolist() == prompt
    assert not loss[: len(prompt)].any()
    assert loss[len(prompt) :].all()


def test_conversations_that_cannot_be_learnt(encoder):
    with pytest.raises(ValueError, match="without an answer"):
        encoder.encode(MESSAGES[:1])
    forgetful = Encoder(encoder.data, BOS, (EOS,), "{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        forgetful.encode(MESSAGES)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_holds_all_rows_in_order(tmp_path, encoder, source, workers):
    path, texts = source
    seen = []
    store = build(str(path), encoder, tmp_path / "cache", workers=workers, progress=lambda *n: seen.append(n))
    assert store.tokens.dtype == np.uint16
    assert len(store.offsets) == len(texts) + 1
    for text, start, end in zip(texts, store.offsets, store.offsets[1:], strict=False):
        assert store.tokens[start:end].tolist() == encoder.encode(text)[0].tolist()
    assert seen[-1] == (len(texts), len(store.tokens))
    assert store.loss.all()


def test_a_store_is_made_once(tmp_path, encoder, source, monkeypatch):
    path, _ = source
    first = build(str(path), encoder, tmp_path / "cache", workers=1)
    monkeypatch.setattr(tokens, "_write", None)
    assert build(str(path), encoder, tmp_path / "cache", workers=1).folder == first.folder
    monkeypatch.undo()
    other = Encoder(encoder.data, BOS, (EOS,), None)
    assert build(str(path), other, tmp_path / "cache", workers=1).folder != first.folder
    path.write_text('{"text": "changed"}\n')
    changed = build(str(path), encoder, tmp_path / "cache", workers=1)
    assert changed.folder != first.folder
    assert len(changed.offsets) == 2


def test_nothing_half_written_is_found(tmp_path, encoder):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' * 500 + "{broken\n")
    with pytest.raises(ValueError, match="line 501"):
        build(str(path), encoder, tmp_path / "cache", workers=1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_empty_source_is_refused(tmp_path, encoder):
    path = tmp_path / "data.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        build(str(path), encoder, tmp_path / "cache", workers=1)


def test_a_store_opens_again(tmp_path, encoder, source):
    store = build(str(source[0]), encoder, tmp_path / "cache", workers=1)
    again = TokenStore(store.folder)
    assert np.array_equal(again.tokens, store.tokens)
    assert again.source == str(source[0])
