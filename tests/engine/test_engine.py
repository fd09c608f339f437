"""LLM on the numpy engine: generation, chat, contexts, log-probabilities, and what users may get wrong."""

import logging
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import prosparse
from prosparse.engine.completion import Completion
from prosparse.engine.engine import LLM, Context
from prosparse.engine.sampler import SamplingParams
from prosparse.model.model import Model, Tensor
from tiny import stored

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def llm(tiny_model) -> LLM:
    return LLM(tiny_model(act="relu", seed=3), backend="naive")


def scripted(tiny_model, text: str, then: int = 257) -> LLM:
    """A model that after <s> says `text`, then token `then`: each token's successor is in the head."""
    script = [256, *text.encode(), then]
    assert len(set(script)) == len(script), "every token must have one successor"
    model = tiny_model(hidden=288, heads=4, vocab=288, layers=1)
    tensors = {
        name: stored(np.zeros(t.shape, np.float32), "F32") if "layers" in name else t
        for name, t in model.tensors.items()
    }
    head = np.zeros((288, 288), np.float32)
    for token, successor in pairwise(script):
        head[successor, token] = 1
    tensors["model.embed_tokens.weight"] = stored(np.eye(288, dtype=np.float32), "F32")
    tensors["model.norm.weight"] = stored(np.ones(288, np.float32), "F32")
    tensors["lm_head.weight"] = stored(head, "F32")
    return LLM(replace(model, tensors=tensors), backend="naive")


def test_greedy_follows_the_logits(llm):
    ids = [256, 72, 105]
    answer = llm.generate(ids, max_tokens=8, sampling=GREEDY)
    for _ in range(8):
        ids.append(int(llm.forward(ids)[0].argmax()))
    assert answer.token_ids == ids[3:]
    assert (answer.n_prompt, answer.n_gen, answer.finish_reason) == (3, 8, "length")
    assert answer.mode == "exact" and 0.2 < answer.sparsity < 0.8
    assert 0 < answer.bytes_per_token < sum(llm.traffic.per_token().values())
    assert answer.prompt_tok_s > 0 and answer.gen_tok_s > 0


def test_text_gets_bos_once_and_control_tokens(llm):
    assert llm.tokenizer.encode("hi", special=True) == [256, 104, 105]
    expected = llm.generate([256, 104, 105], max_tokens=4, sampling=GREEDY).token_ids
    assert llm.generate("hi", max_tokens=4, sampling=GREEDY).token_ids == expected
    assert llm.generate("<s>hi", max_tokens=4, sampling=GREEDY).token_ids == expected


def test_stream_is_the_same_text_in_pieces(tiny_model):
    llm = scripted(tiny_model, "naïv, 中")
    *pieces, last = llm.generate([256], sampling=GREEDY, stream=True)
    assert [piece.text for piece in pieces] == list("naïv, 中")
    assert all(piece.completion is None for piece in pieces)
    assert "".join(map(str, [*pieces, last])) == last.completion.text == "naïv, 中"
    assert last.completion.finish_reason == "stop"
    assert last.completion.n_gen == len("naïv, 中".encode())


def test_stop_strings_cross_tokens_and_are_cut(tiny_model):
    llm = scripted(tiny_model, "one, tw")
    answer = llm.generate([256], sampling=GREEDY, stop=["e, t", "zzz"])
    assert (answer.text, answer.finish_reason) == ("on", "stop")
    # what might have become a stop string comes out in the end
    assert llm.generate([256], sampling=GREEDY, stop=["two"]).text == "one, tw"


def test_unfinished_character_is_marked(tiny_model):
    llm = scripted(tiny_model, "a中")
    assert llm.generate([256], max_tokens=3, sampling=GREEDY).text == "a\ufffd"


def test_max_tokens(tiny_model):
    llm = scripted(tiny_model, "abcdef")
    nothing = llm.generate([256], max_tokens=0, sampling=GREEDY)
    assert (nothing.text, nothing.n_gen, nothing.finish_reason, nothing.gen_tok_s) == ("", 0, "length", 0)
    assert llm.generate([256], max_tokens=6, sampling=GREEDY).finish_reason == "length"
    assert llm.generate([256], max_tokens=7, sampling=GREEDY).finish_reason == "stop"
    assert llm.generate([256], max_tokens=-1, sampling=GREEDY).text == "abcdef"


def test_full_context_ends_the_answer(tiny_model):
    llm = LLM(tiny_model(seed=3), n_ctx=8, backend="naive")
    answer = llm.generate([256] * 6, max_tokens=-1, sampling=GREEDY)
    assert (answer.n_gen, answer.finish_reason) == (3, "length")
    assert llm.generate([256] * 8, max_tokens=5, sampling=GREEDY).n_gen == 1
    with pytest.raises(ValueError, match=r"9 tokens.* 8"):
        llm.generate([256] * 9)


def test_seed_repeats_a_draw(llm):
    draws = [llm.generate([256], max_tokens=20, sampling=SamplingParams(seed=s)).token_ids for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_answers_do_not_depend_on_earlier_ones(llm):
    first = llm.generate("hello", max_tokens=6, sampling=GREEDY)
    llm.generate("something else", max_tokens=6, sampling=GREEDY)
    assert llm.generate("hello", max_tokens=6, sampling=GREEDY).token_ids == first.token_ids


def test_two_streams_at_once(llm):
    expected = [llm.generate(p, max_tokens=6, sampling=GREEDY).text for p in ("one", "two")]
    streams = [llm.generate(p, max_tokens=6, sampling=GREEDY, stream=True) for p in ("one", "two")]
    pieces = [[next(s).text, next(s).text] for s in streams]
    assert ["".join(p) + "".join(map(str, s)) for p, s in zip(pieces, streams, strict=True)] == expected


def test_context_computes_only_what_is_new(llm):
    context = Context(llm, 64)
    assert context.start([1, 2, 3, 4]) == 4
    context.append(5)
    assert context.start([1, 2, 3, 4, 5, 6]) == 1
    assert context.start([1, 2, 9, 6]) == 2
    assert np.allclose(context.logits, llm.forward([1, 2, 9, 6])[0], atol=1e-4)
    assert context.start([1, 2, 9, 6]) == 1, "the last token's logits are always computed"
    assert context.ids == [1, 2, 9, 6]


def test_chat_uses_the_template_and_context(tiny_model):
    model = tiny_model(seed=3)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    metadata = dict(model.tokenizer.gguf) | {"tokenizer.chat_template": template}
    llm = LLM(replace(model, tokenizer=replace(model.tokenizer, gguf=metadata)), backend="naive")
    messages = [{"role": "user", "content": "hi"}]
    assert llm.chat_ids(messages) == [256, 258, *b"user\nhi", 259]
    context = Context(llm)
    answer = llm.chat(messages, max_tokens=4, sampling=GREEDY, context=context)
    assert isinstance(answer, Completion)
    assert context.ids[:10] == llm.chat_ids(messages)
    with pytest.raises(ValueError, match="role"):
        llm.chat([{"role": "wizard", "content": "hi"}])


def test_chat_without_a_template_is_chatml(llm):
    assert llm.chat_template is None
    ids = llm.chat_ids([{"role": "user", "content": "hi"}])
    assert ids == [256, 258, *b"user\nhi", 259, 10, 258, *b"assistant\n"]


def test_minicpm_without_a_template_has_its_own(tiny_model):
    llm = LLM(tiny_model("minicpm"), backend="naive")
    assert llm.chat_ids([{"role": "user", "content": "hi"}]) == [256, *"<用户>hi<AI>".encode()]


def test_logprobs(llm):
    ids = np.random.default_rng(0).integers(0, 256, 40)
    logits = llm.forward(ids, all_logits=True).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = expected[np.arange(39), ids[1:]]
    assert np.allclose(llm.logprobs(ids), expected, atol=1e-4)
    assert np.allclose(llm.logprobs(ids, start=25), expected[25:], atol=1e-4)
    assert llm.logprobs(ids[:1]).shape == (0,)
    with pytest.raises(ValueError, match="start"):
        llm.logprobs(ids, start=40)
    with pytest.raises(ValueError, match=r"514 .* 512"):
        llm.logprobs([1] * 514)


def test_logprobs_in_parts(llm, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 256, 40)
    whole = llm.logprobs(ids)
    monkeypatch.setattr("prosparse.engine.engine._LOGITS_FLOATS", 7 * 288)
    assert np.allclose(llm.logprobs(ids), whole, atol=1e-4)


def test_context_limits(tiny_model):
    model = tiny_model()
    assert LLM(model, backend="naive").n_ctx == 512
    long = replace(model, config=replace(model.config, max_position_embeddings=100_000))
    assert LLM(long, backend="naive").n_ctx == 4096
    windowed = replace(model, config=replace(model.config, sliding_window=64))
    assert LLM(windowed, backend="naive").n_ctx == 64
    with pytest.raises(ValueError, match=r"65.*sliding window is 64"):
        LLM(windowed, backend="naive", n_ctx=65)
    with pytest.raises(ValueError, match=r"513.*512"):
        LLM(model, backend="naive", n_ctx=513)


@pytest.mark.parametrize(
    ("act", "mode", "chosen"),
    [
        ("silu", "auto", "dense"),
        ("relu", "auto", "exact"),
        ("relu", "dense", "dense"),
        ("relu", "exact", "exact"),
    ],
)
def test_mode(tiny_model, act, mode, chosen):
    llm = LLM(tiny_model(act=act), mode=mode, backend="naive")
    assert llm.mode == chosen
    assert llm.mode_reason.startswith(chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "exact"}, "silu"),
        ({"mode": "fast"}, "mode"),
        ({"backend": "gpu"}, "backend"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_threads": 0}, "threads"),
    ],
)
def test_bad_options(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(tiny_model(), **{"backend": "naive"} | options)


def test_bad_prompts(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.generate([])
    with pytest.raises(ValueError, match="max_tokens"):
        llm.generate("hi", max_tokens=-2)
    with pytest.raises(ValueError, match="token ids"):
        llm.generate([288])


def test_model_without_tokenizer_runs_on_ids(tiny_model):
    model = tiny_model()
    bare = replace(model, tokenizer=type(model.tokenizer)())
    llm = LLM(bare, backend="naive")
    assert llm.forward([1, 2]).shape == (1, 288)
    with pytest.raises(ValueError, match="tokenizer"):
        llm.generate("hi")


def test_repacked_types_are_told(tiny_model, caplog):
    model = tiny_model()
    name = "model.layers.0.self_attn.q_proj.weight"
    zeros = np.zeros((96, 96 // 32 * 22), np.uint8)
    tensors = dict(model.tensors) | {name: Tensor("Q5_0", (96, 96), zeros)}
    with caplog.at_level(logging.WARNING, "prosparse"):
        LLM(replace(model, tensors=tensors), backend="naive")
    assert [r.message for r in caplog.records] == [f"{model.name}: repacked 1 tensors of Q5_0 as Q5_1"]


def test_traffic_adds_up(tiny_model):
    for tied in (False, True):
        model: Model = tiny_model(tied=tied)
        parts = LLM(model, backend="naive").traffic.per_token()
        rows_not_read = 0 if tied else model.tensors["model.embed_tokens.weight"].nbytes
        assert sum(parts.values()) == model.size_bytes - rows_not_read + 96 * 4
        assert parts["head"] == 288 * 96 * 4
        half = LLM(model, backend="naive").traffic.per_token(0.5)
        assert half["FFN up"] == parts["FFN up"] / 2 and half["FFN gate"] == parts["FFN gate"]


def test_load_overrides_the_activation(tiny_model, monkeypatch):
    monkeypatch.setattr("prosparse.formats.open_model", lambda path: tiny_model())
    assert prosparse.load("x", backend="naive").config.activation.name == "silu"
    llm = prosparse.load("x", hidden_act="fatrelu", hidden_act_param=0.5, backend="naive")
    assert (llm.config.activation.param, llm.mode) == (0.5, "exact")


def test_load_and_answer_demo_model(smollm2_path):
    pytest.importorskip("prosparse._core")
    llm = prosparse.load(smollm2_path, n_ctx=256)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    pieces = [piece.text for piece in llm.chat(messages, max_tokens=24, sampling=GREEDY, stream=True)]
    assert "Paris" in "".join(pieces) and len(pieces) > 4


def test_native_engine_in_threads(tiny_model):
    """Callers on several threads may share one LLM; each has its own context."""
    pytest.importorskip("prosparse._core")
    llm = LLM(tiny_model(act="relu", seed=3), n_threads=2)
    prompts = ["one", "two", "three"]
    expected = [llm.generate(p, max_tokens=12, sampling=GREEDY).token_ids for p in prompts]
    found: dict[str, list[int]] = {}

    def work(prompt: str) -> None:
        found[prompt] = llm.generate(prompt, max_tokens=12, sampling=GREEDY).token_ids

    threads = [threading.Thread(target=work, args=(p,)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[p] for p in prompts] == expected
