"""The engine and batched torch score as the plain twin does, one option at a time."""

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.evaluate.perplexity import perplexity
from prosparse.evaluate.runners import EngineRunner
from prosparse.evaluate.scoring import Request
from prosparse.model.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prosparse.evaluate.naive import NaiveRunner  # noqa: E402
from prosparse.evaluate.torch_runner import TorchRunner, batches  # noqa: E402
from prosparse.sparsify import hf_model  # noqa: E402

N_CTX = 64
# by hand: shared contexts, one-token contexts and options, one option within another, the same one twice
REQUESTS = [
    Request((256, 5, 6, 7), (8, 9)),
    Request((256, 5, 6, 7), (8,)),
    Request((256, 5, 6, 7), (8, 9)),
    Request((256, 5, 6), (7, 8, 9)),
    Request((256,), (1,)),
    Request((9,), (9, 9, 9, 9, 9)),
]


def random_requests(count: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    sizes = [*zip(rng.integers(1, 40, count - 1), rng.integers(1, 12, count - 1), strict=True), (60, 5)]
    return [
        Request(tuple(map(int, rng.integers(0, 256, n))), tuple(map(int, rng.integers(0, 256, m))))
        for n, m in sizes
    ]


def greedy_request(naive: NaiveRunner, context: tuple[int, ...], n: int) -> Request:
    """What greedy decoding says, so that some score is greedy."""
    option: tuple[int, ...] = ()
    for _ in range(n):
        # the last token is not fed
        option += (int(naive._log_softmax([*context, *option, 0])[-1].argmax()),)
    return Request(context, option)


def tokenizer_of(model) -> Tokenizer:
    return Tokenizer.build(model.tokenizer, model.config.bos_token_id, model.config.eos_token_ids)


def naive_of(model) -> NaiveRunner:
    return NaiveRunner(hf_model.load(model), tokenizer_of(model), N_CTX)


def torch_of(model, **options) -> TorchRunner:
    return TorchRunner(hf_model.load(model), tokenizer_of(model), N_CTX, **options)


def check(got, want, tolerance: float) -> None:
    assert [score.greedy for score in got] == [score.greedy for score in want]
    assert [s.logprob for s in got] == pytest.approx([s.logprob for s in want], abs=tolerance)


@pytest.fixture(scope="module")
def cases(tiny_model):
    """(model, requests, the plain twin's scores)."""
    found = {}
    for name, options in {"llama": {"act": "relu"}, "gemma": {"architecture": "gemma"}}.items():
        model = tiny_model(seed=3, vocab=301, **options)
        naive = naive_of(model)
        requests = [*REQUESTS, *random_requests(12), greedy_request(naive, (256, 70, 71), 3)]
        found[name] = model, requests, naive.score(requests)
        assert found[name][2][-1].greedy and not found[name][2][0].greedy
    return found


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("tokens", [1, 100, 100_000])
def test_torch(cases, name, tokens):
    """One at a time, in batches, all at once."""
    model, requests, want = cases[name]
    check(torch_of(model, tokens=tokens).score(requests), want, 1e-3)


def test_logits_in_chunks(cases, monkeypatch):
    model, requests, want = cases["llama"]
    monkeypatch.setattr("prosparse.evaluate.torch_runner._LOGITS", 301 * 3)
    check(torch_of(model).score(requests), want, 1e-3)


def test_bfloat16_is_near(cases):
    model, requests, want = cases["llama"]
    got = torch_of(model, bfloat16=True).score(requests)
    off = [abs(a.logprob - b.logprob) / len(r.option) for a, b, r in zip(got, want, requests, strict=True)]
    assert 0 < np.mean(off) < 0.1


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_engine(cases, name, backend, monkeypatch):
    if backend == "cpu":
        pytest.importorskip("prosparse._core")
    model, requests, want = cases[name]
    runner = EngineRunner(LLM(model, n_ctx=N_CTX, backend=backend))
    check(runner.score(requests), want, 0.02)
    monkeypatch.setattr("prosparse.evaluate.runners._LOGITS", 301 * 3)
    check(runner.score(requests), want, 0.02)


def test_nothing_to_score(tiny_model):
    model = tiny_model(seed=3)
    assert torch_of(model).score([]) == EngineRunner(LLM(model, backend="naive")).score([]) == []


def test_ties_are_greedy(tiny_model):
    """Two tokens with one row of the head are equally likely; neither has a likelier one beside it."""
    model = tiny_model(seed=3)
    trunk = hf_model.load(model)
    naive = NaiveRunner(trunk, tokenizer_of(model), N_CTX)
    best = greedy_request(naive, (256, 80), 1).option[0]
    twin = (best + 1) % 256
    with torch.no_grad():
        trunk.head[twin] = trunk.head[best]
    requests = [Request((256, 80), (token,)) for token in (best, twin)]
    for runner in naive, TorchRunner(trunk, tokenizer_of(model), N_CTX):
        first, second = runner.score(requests)
        assert first.greedy and second.greedy and first.logprob == pytest.approx(second.logprob, abs=1e-6)


def test_what_requests_share_is_computed_once(tiny_model):
    runner = EngineRunner(LLM(tiny_model(seed=3), n_ctx=N_CTX, backend="naive"))
    context = tuple(range(30))
    runner.score([Request(context, (1, 2)), Request(context, (3, 4, 5)), Request(context[:20], (1,))])
    stats = runner.llm.stats()
    assert stats["prefill_tokens"] + stats["tokens"] == 29 + 2 + 3 + 1


def test_progress(cases):
    model, requests, _ = cases["llama"]
    for runner in torch_of(model, tokens=100), EngineRunner(LLM(model, backend="naive")):
        seen: list[tuple[int, int]] = []
        runner.score(requests, lambda *step, seen=seen: seen.append(step))
        assert seen[-1] == (len(requests), len(requests)) and seen == sorted(seen) and len(seen) > 3


def test_batches_hold_what_is_alike():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    found = list(batches(lengths, 100, rows=7))
    assert sorted(i for batch in found for i in batch) == list(range(200))
    assert all(len(batch) <= 7 and len(batch) * max(lengths[i] for i in batch) <= 100 for batch in found)
    longest = [max(lengths[i] for i in batch) for batch in found]
    assert longest == sorted(longest, reverse=True) and longest[0] == max(lengths)
    assert list(batches([500, 3], 100)) == [[0], [1]]
    assert list(batches([], 100)) == []


def test_sparsity_leaves_padding_out(tiny_model):
    """In batches, one at a time and on the engine: the same share, and then counted anew."""
    model = tiny_model(seed=3, act="relu")
    requests = [Request((i, *context), option) for i, (context, option) in enumerate(random_requests(12))]
    shares = []
    runners = (
        torch_of(model, tokens=1),
        torch_of(model),
        EngineRunner(LLM(model, n_ctx=N_CTX, backend="naive")),
    )
    for runner in runners:
        runner.score(requests)
        shares.append(runner.sparsity())
    assert 0.3 < shares[0] < 0.7
    assert shares[1] == pytest.approx(shares[0], abs=1e-4) and shares[2] == pytest.approx(shares[0], abs=1e-3)
    before = [mlp.observe for mlp in runners[0]._trunk.mlps]
    assert not any(before)
    runners[1].score(requests[:1])
    assert runners[1].sparsity() != shares[1]


def test_perplexity_on_torch(tiny_model):
    model = tiny_model(seed=3)
    ids = np.random.default_rng(2).integers(0, 256, 100).tolist()
    want = perplexity(LLM(model, backend="naive"), ids, 16)
    assert perplexity(torch_of(model), ids, 16).ppl == pytest.approx(want.ppl, rel=1e-3)
    assert perplexity(naive_of(model), ids, 16).ppl == pytest.approx(want.ppl, rel=1e-3)


def test_logprobs_as_the_engine_has_them(tiny_model):
    model = tiny_model(seed=3)
    llm, runner = LLM(model, n_ctx=N_CTX, backend="naive"), torch_of(model)
    ids = list(range(20))
    for start in 0, 7, 19:
        np.testing.assert_allclose(runner.logprobs(ids, start), llm.logprobs(ids, start), atol=0.02)
    for bad in -1, 20:
        with pytest.raises(ValueError, match="start"):
            runner.logprobs(ids, bad)
    with pytest.raises(ValueError, match="holds 64"):
        runner.logprobs(list(range(66)))
