"""Self-generated data: what is sampled is what the model would say, and a store survives interruptions."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from prosparse.model.chat import CHATML
from prosparse.sparsify import tokens
from prosparse.sparsify.tokens import Encoder, TokenStore
from tiny import byte_tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from prosparse.sparsify import hf_model, sampling, selfdata  # noqa: E402
from prosparse.sparsify.batches import Mixture  # noqa: E402
from prosparse.sparsify.sampling import Sampler  # noqa: E402
from prosparse.sparsify.selfdata import Prompts, build, generate, starts  # noqa: E402

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trunk(tiny_model):
    return hf_model.load(tiny_model())


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(byte_tokenizer(288), bos_id=BOS, eos_ids=(EOS,), chat_template=CHATML)


def logits(trunk, tokens: np.ndarray) -> "torch.Tensor":
    """By one pass over the whole context, with the model's own attention."""
    with torch.no_grad():
        return trunk.hidden(torch.from_numpy(tokens)) @ trunk.head.T


@pytest.mark.parametrize("attention", sampling.ATTENTION)
@pytest.mark.parametrize(
    "options",
    [
        {"kv": 4},
        {"kv": 1},
        {"architecture": "qwen3", "qk_norm": True, "head_dim": 32},
        {"architecture": "qwen2", "bias": True, "tied": True},
        {"architecture": "mistral", "sliding_window": 160},
        {"act": "fatrelu_0.3"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_greedy_is_the_naive_argmax(tiny_model, options, attention):
    trunk = hf_model.load(tiny_model(**options))
    given = [[BOS], [BOS, 104, 105], [5] * 7]
    (tokens,) = generate(trunk, given, context=160, batch=3, temperature=0, seed=0, attention=attention)
    assert tokens.shape == (3, 160)
    scores = logits(trunk, tokens)
    for i, start in enumerate(given):
        assert tokens[i, : len(start)].tolist() == start
        own = scores[i, len(start) - 1 : -1]
        chosen = own.gather(1, torch.from_numpy(tokens[i, len(start) :, None]))[:, 0]
        assert (own.max(1).values - chosen).max() < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_those_of_the_softmax(trunk, temperature):
    n = 6000
    (tokens,) = generate(trunk, [[BOS, 7]] * n, context=3, batch=n, temperature=temperature, seed=3)
    p = (logits(trunk, tokens[:1, :2])[0, 1] / temperature).double().softmax(-1).numpy()
    expected, got = n * p, np.bincount(tokens[:, 2], minlength=len(p))
    often = expected >= 5
    expected = np.append(expected[often], expected[~often].sum())
    got = np.append(got[often], got[~often].sum())
    chi2, freedom = ((got - expected) ** 2 / expected.clip(min=1)).sum(), len(expected) - 1
    assert freedom > 10
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_top_p_keeps_the_nucleus(trunk):
    (tokens,) = generate(trunk, [[BOS]] * 2000, context=2, batch=2000, top_p=0.5, seed=0)
    p = logits(trunk, tokens[:1, :1])[0, 0].softmax(-1).numpy()
    order = np.argsort(-p)
    nucleus = order[: np.searchsorted(np.cumsum(p[order]), 0.5) + 1]
    assert set(tokens[:, 1]) == set(nucleus)


def test_only_the_tokenizers_tokens_are_sampled(trunk):
    (tokens,) = generate(trunk, [[BOS]] * 50, context=20, batch=50, seed=0, vocab=40)
    assert tokens[:, 1:].max() < 40


def test_rows_are_a_function_of_the_seed(trunk):
    def rows(seed: int, first: int = 0) -> list[np.ndarray]:
        return list(generate(trunk, [[BOS]] * 10, context=24, batch=4, seed=seed, first=first))

    once, again, other = rows(1), rows(1), rows(2)
    assert [len(batch) for batch in once] == [4, 4, 2]
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not np.array_equal(once[0], other[0])
    assert np.array_equal(rows(1, first=2)[0], once[2])
    everything = np.concatenate(once)
    assert len({row.tobytes() for row in everything}) == 10
    assert rows(1, first=3) == []


def test_the_model_is_left_as_it_was(trunk):
    tokens = np.arange(20)[None]
    before, attention = logits(trunk, tokens), trunk.model.config._attn_implementation
    trunk.model.train()
    list(generate(trunk, [[BOS]], context=4, batch=1, seed=0))
    assert trunk.model.training
    trunk.model.eval()
    assert trunk.model.config._attn_implementation == attention
    assert not any(hasattr(module, "sampling_cache") for module in trunk.model.modules())
    assert torch.equal(logits(trunk, tokens), before)


def test_logits_that_are_not_finite(tiny_model):
    trunk = hf_model.load(tiny_model())
    with torch.no_grad():
        trunk.mlps[1].down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        list(generate(trunk, [[BOS]], context=4, batch=1, seed=0))
    assert not trunk.model.config._attn_implementation.startswith("prosparse_sampling")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "at least 1 row of 2"),
        ({"context": 513}, "the model knows 512 positions"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 0}, "top-p 0"),
        ({"attention": "flash"}, "sdpa, matmul are known"),
    ],
)
def test_settings_that_cannot_be(trunk, options, message):
    values = {"context": 8, "batch": 1, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        list(generate(trunk, [[BOS]], **values))


@pytest.mark.parametrize("start", [[], [1] * 8, [288], [-1]])
def test_starts_that_do_not_fit(trunk, start):
    with pytest.raises(ValueError, match="a start"):
        list(generate(trunk, [start], context=8, batch=1, seed=0))


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_a_short_sliding_window_is_refused(tiny_model, architecture):
    model = tiny_model(architecture, sliding_window=16, bias=architecture == "qwen2")
    with pytest.raises(ValueError, match="at most 16, not 17"):
        Sampler(hf_model.load(model), 1, 17)


def test_starts_of_rows(encoder):
    rows = starts(encoder, 4, 0.5)
    document, conversation = [BOS], [BOS, IM_START, *b"user\n"]
    assert rows == [document, conversation] * 2
    assert starts(encoder, 3, 0.0) == [document] * 3
    assert starts(encoder, 2, 1.0) == [conversation] * 2
    assert sum(len(row) > 1 for row in starts(encoder, 100, 0.3)) == 30
    without = Encoder(encoder.data, BOS, (EOS,))
    assert starts(without, 3, 1.0) == [document] * 3
    with pytest.raises(ValueError, match="between 0 and 1"):
        starts(encoder, 1, 1.5)
    with pytest.raises(ValueError, match="chat 0"):
        starts(Encoder(encoder.data, BOS, (EOS,), "hello"), 1, 1.0)


@pytest.fixture
def text(tmp_path, encoder) -> TokenStore:
    """Forty documents of 0 to 39 letters."""
    rows = "".join(json.dumps({"text": chr(97 + i % 26) * i or " "}) + "\n" for i in range(40))
    (tmp_path / "text.jsonl").write_text(rows)
    return tokens.build(str(tmp_path / "text.jsonl"), encoder, tmp_path / "stores", workers=1)


def test_rows_that_go_on_from_text(encoder, text):
    prompts = Prompts([text, text], [1.0, 0.0], 0.3)
    rows = starts(encoder, 200, 0.25, prompts, 20, seed=1)
    conversations = [row for row in rows if IM_START in row]
    given = [row for row in rows if row not in conversations and len(row) > 1]
    assert len(conversations) == 50 and len(given) == 60
    assert max(map(len, given)) == 19  # the text has a BOS of its own
    for row in given:
        assert row[0] == BOS and len(set(row[1:])) == 1 and EOS not in row
    # documents of every length, one token of them at least
    assert len({row[1] for row in given}) > 20
    assert rows == starts(encoder, 200, 0.25, prompts, 20, seed=1)
    assert rows != starts(encoder, 200, 0.25, prompts, 20, seed=2)
    everything = starts(encoder, 10, 0.5, Prompts([text], [1.0], 1.0))
    assert sum(len(row) > 1 and IM_START not in row for row in everything) == 5
    assert starts(encoder, 10, 0.0, prompts, most=1) == [[BOS]] * 10


@pytest.mark.parametrize(
    ("weights", "share", "message"),
    [
        ([1.0], 1.5, "0 to 1"),
        ([1.0, 2.0], 0.5, "one of each"),
        ([0.0], 0.5, "all 0"),
        ([-1.0], 0.5, "negative"),
    ],
)
def test_prompts_that_cannot_be(text, weights, share, message):
    with pytest.raises(ValueError, match=message):
        Prompts([text], weights, share)


def test_a_store_with_prompts_is_another(trunk, encoder, tmp_path, text):
    plain = small(trunk, encoder, tmp_path)
    prompted = small(trunk, encoder, tmp_path, prompts=Prompts([text], [1.0], 0.5))
    assert prompted.folder != plain.folder
    rows, losses = (values.reshape(10, 40) for values in (prompted.tokens, prompted.loss))
    given = starts(encoder, 10, 0.5, Prompts([text], [1.0], 0.5), 39, seed=5)
    for row, loss, start in zip(rows, losses, given, strict=True):
        assert row[: len(start)].tolist() == start
        assert loss.tolist() == [0] * len(start) + [1] * (40 - len(start))


def test_a_mark_of_turns_begins_no_document(smollm2_path):
    from prosparse.formats import open_model

    model = open_model(smollm2_path)
    encoder = Encoder(model.tokenizer, model.config.bos_token_id, model.config.eos_token_ids)
    document, conversation = starts(encoder, 2, 0.5)
    assert encoder.tokenizer.decode(document, special=True) == "<|endoftext|>"  # BOS is <|im_start|>
    text = encoder.tokenizer.decode(conversation, special=True)
    assert text.startswith("<|im_start|>system\nYou are") and text.endswith("<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("conversation", [True, False])
def test_documents_end_where_turns_do_not(encoder, conversation):
    row = np.array([BOS, 97, EOS, 98, IM_END, 99, EOS, BOS, 100, EOS])
    places = selfdata._Documents(encoder).within(row, 1, conversation)
    assert places.tolist() == [3, 7]


@pytest.mark.parametrize(("conversation", "places"), [(True, [5]), (False, [3, 5])])
def test_one_mark_may_end_turns_and_documents(encoder, conversation, places):
    plain = dict(encoder.data.gguf)
    plain["tokenizer.ggml.tokens"] = [t.replace("<|im_", "[") for t in plain["tokenizer.ggml.tokens"]]
    encoder = Encoder(replace(encoder.data, gguf=plain), BOS, (EOS,), ZEPHYR)
    row = np.array([BOS, 97, EOS, 98, 99, BOS, 100, EOS])
    assert selfdata._Documents(encoder).within(row, 1, conversation).tolist() == places


def small(trunk, encoder, cache, **changes):
    options = {"context": 40, "batch": 3, "seed": 5, "key": "tiny"}
    return build(trunk, encoder, 400, cache, **options | changes)


def test_a_store_holds_whole_rows(trunk, encoder, tmp_path):
    seen = []
    store = small(trunk, encoder, tmp_path, progress=lambda *n: seen.append(n))
    assert len(store.tokens) == 400 and store.tokens.dtype == np.uint16
    assert seen == [(120, 400), (240, 400), (360, 400), (400, 400)]
    rows = store.tokens.reshape(10, 40)
    given = [len(row) for row in starts(encoder, 10, 0.5)]
    for loss, n in zip(store.loss.reshape(10, 40), given, strict=True):
        assert loss.tolist() == [0] * n + [1] * (40 - n)
    offsets = store.offsets.tolist()
    assert offsets == sorted(set(offsets)) and offsets[0] == 0 and offsets[-1] == 400
    expected = {40 * i for i in range(11)}
    for i, (row, n) in enumerate(zip(rows, given, strict=True)):
        expected |= {40 * i + j + 1 for j in range(n, 40) if row[j] == EOS}
        expected |= {40 * i + j for j in range(n + 1, 40) if row[j] == BOS}
    assert set(offsets) == expected
    assert [path.name for path in tmp_path.iterdir()] == [store.folder.name]
    meta = json.loads((store.folder / "meta.json").read_text())
    assert meta["settings"]["seed"] == 5 and store.source == "tiny, its own text"
    batch = Mixture([store], [1.0], context=39, seed=0, vocab_size=288).batch(0, 4)
    assert batch.tokens.shape == (4, 40)


def test_a_store_is_sampled_once(trunk, encoder, tmp_path):
    store = small(trunk, encoder, tmp_path)
    assert small(None, encoder, tmp_path).folder == store.folder
    for change in ({"seed": 6}, {"temperature": 0.5}, {"chat": 0.0}, {"key": "other"}, {"top_p": 0.9}):
        assert small(trunk, encoder, tmp_path, **change).folder != store.folder


@pytest.mark.parametrize("finished", [1, 4])
def test_an_interrupted_run_goes_on(trunk, encoder, tmp_path, monkeypatch, finished):
    def stop(tokens: int, of_all: int) -> None:
        if tokens == min(120 * finished, 400):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(trunk, encoder, tmp_path / "a", progress=stop)
    assert [path.suffix for path in (tmp_path / "a").iterdir()] == [".part"]
    sampled = []
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *args: sampled.append(args) or sample(*args))
    resumed = small(trunk, encoder, tmp_path / "a")
    assert len(sampled) == 4 - finished
    unbroken = small(trunk, encoder, tmp_path / "b")
    for name in ("tokens.bin", "loss.bin", "offsets.npy", "meta.json"):
        assert (resumed.folder / name).read_bytes() == (unbroken.folder / name).read_bytes()
    assert list((tmp_path / "a").iterdir()) == [resumed.folder]


def test_sizes_that_cannot_be(trunk, encoder, tmp_path):
    for change in ({"batch": 0}, {"context": 0}, {"chat": 2.0}):
        with pytest.raises(ValueError):
            small(trunk, encoder, tmp_path, **change)
    with pytest.raises(ValueError, match="0 tokens"):
        build(trunk, encoder, 0, tmp_path, context=8, batch=1, seed=0, key="tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", sampling.ATTENTION)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_give_what_single_steps_give(tiny_model, attention, temperature):
    trunk = hf_model.load(tiny_model(), device="cuda")
    options = SimpleNamespace(temperature=temperature, attention=attention)
    given = [[BOS], [BOS, 104, 105]] * 4
    by_graph = Sampler(trunk, 8, 300, graphs=True, **vars(options))
    by_step = Sampler(trunk, 8, 300, graphs=False, **vars(options))
    for seed in (0, 1, 0):
        assert np.array_equal(by_graph.sample(given, seed), by_step.sample(given, seed))
