"""The native engine against its numpy twin, on small random models of every kind."""

import numpy as np
import pytest

from prosparse.engine.engine import LLM
from prosparse.formats import open_model

_core = pytest.importorskip("prosparse._core")

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0", "Q4_1")
TOKENS = np.random.default_rng(1).integers(0, 256, 45).astype(np.int32)
# of the largest logit; the KV cache is float16 and activations are rounded to 15 bits
TOLERANCE = 2e-3
# AVX-512 multiplies bfloat16 weights with bfloat16 activations in prefill, as PyTorch and llama.cpp do
BF16_PREFILL = 2e-2 if _core.isa() == "avx512" else TOLERANCE


def close(a: np.ndarray, b: np.ndarray, share: float = 1.0, tolerance: float = TOLERANCE) -> None:
    """At `share` of the positions no logit differs by more than the tolerance."""
    assert np.isfinite(a).all()
    assert np.quantile(np.abs(a - b).max(axis=-1), share) <= tolerance * np.abs(b).max()


def decode(llm: LLM, tokens: np.ndarray) -> np.ndarray:
    cache = llm.new_cache(len(tokens))
    return np.array([llm.forward(tokens[i : i + 1], cache)[0] for i in range(len(tokens))])


def check(model, mode: str = "dense", share: float = 1.0) -> None:
    """Prefill and decode both give the twin's logits, and count the same active neurons to a few."""
    twin = LLM(model, backend="naive", mode=mode)
    expected = twin.forward(TOKENS, all_logits=True)
    llm = LLM(model, mode=mode, n_threads=2)
    bf16 = model.tensors["model.embed_tokens.weight"].type == "BF16"
    close(llm.forward(TOKENS, all_logits=True), expected, share, BF16_PREFILL if bf16 else TOLERANCE)
    close(decode(llm, TOKENS), expected, share)
    want, got = twin.stats(), llm.stats()
    assert got["tokens"] == got["prefill_tokens"] == len(TOKENS)
    assert got["neurons"] == want["prefill_neurons"]
    for kind in ("", "prefill_"):
        assert abs(got[kind + "active"] - want["prefill_active"]) <= 5e-3 * want["prefill_neurons"]


@pytest.mark.parametrize("mode", ["dense", "exact"])
@pytest.mark.parametrize("type", TYPES)
def test_types(tiny_model, type, mode):
    check(tiny_model(type=type, act="relu"), mode)


@pytest.mark.parametrize("type", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("act", ["silu", "gelu", "relu", "fatrelu_0.3", "shiftrelu_0.2", "fatrelu_-1e30"])
def test_activations(tiny_model, act, type):
    model = tiny_model(type=type, act=act)
    # a gate at the threshold may fall to either side, and FATReLU jumps there
    share = 0.5 if act == "fatrelu_0.3" else 1.0
    for mode in ("dense", "exact") if model.config.activation.sparse else ("dense",):
        check(model, mode, share)


def test_nothing_active(tiny_model):
    """A threshold above every gate: the FFN adds nothing."""
    model = tiny_model(act="fatrelu_1e30")
    check(model, "exact")
    llm = LLM(model, mode="exact")
    decode(llm, TOKENS[:3])
    assert llm.stats()["active"] == 0


@pytest.mark.parametrize("mode", ["dense", "exact"])
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 32), (96, 224), (160, 96), (224, 544), (544, 96)])
def test_sizes_of_blocks(tiny_model, type, hidden, intermediate, mode):
    """Multiples of the quantisation block, 32, that are not multiples of 64."""
    check(tiny_model(type=type, act="relu", hidden=hidden, intermediate=intermediate, head_dim=32), mode)


@pytest.mark.parametrize("mode", ["dense", "exact"])
@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "heads", "kv", "head_dim", "vocab"),
    [(2, 1, 1, 1, 2, 261), (6, 7, 3, 1, 2, 263), (50, 63, 5, 5, 10, 301), (98, 130, 7, 1, 18, 999)],
)
def test_odd_sizes(tiny_model, type, hidden, intermediate, heads, kv, head_dim, vocab, mode):
    sizes = {"hidden": hidden, "intermediate": intermediate, "heads": heads, "kv": kv, "head_dim": head_dim}
    check(tiny_model(type=type, act="relu", vocab=vocab, **sizes), mode)


@pytest.mark.parametrize("type", ["F32", "Q8_0"])
@pytest.mark.parametrize(
    "options",
    [
        {"tied": True},
        {"architecture": "qwen2", "bias": True},
        {"architecture": "qwen3", "qk_norm": True, "head_dim": 32},
        {"architecture": "minicpm", "embedding_scale": 12.0, "residual_scale": 0.194, "logit_scale": 6.0},
        {"architecture": "gemma", "head_dim": 256, "kv": 1},
        {"heads": 6, "kv": 6, "head_dim": 16},
        {"heads": 8, "kv": 1, "head_dim": 64},
        {"layers": 1, "rope_theta": 1e6},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_architectures(tiny_model, options, type):
    check(tiny_model(type=type, act="relu", **options), "exact")


@pytest.mark.parametrize(
    ("heads", "kv", "head_dim"), [(8, 1, 80), (12, 4, 64), (14, 2, 24), (5, 1, 16), (3, 3, 18)]
)
def test_heads_of_one_key(tiny_model, heads, kv, head_dim):
    """Heads are computed together or apart, by how many threads there are, with the same bits."""
    model = tiny_model(heads=heads, kv=kv, head_dim=head_dim, layers=1)
    tokens = np.random.default_rng(0).integers(0, 288, 70).astype(np.int32)
    alone = decode(LLM(model, n_threads=1), tokens)
    close(alone, LLM(model, backend="naive").forward(tokens, all_logits=True))
    for threads in (2, 4, 9):
        assert np.array_equal(decode(LLM(model, n_threads=threads), tokens), alone)


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 31, 64, 65, 127, 300])
def test_prompt_lengths(tiny_model, n):
    tokens = np.random.default_rng(n).integers(0, 288, n).astype(np.int32)
    model = tiny_model(type="Q8_0", act="relu")
    expected = LLM(model, backend="naive").forward(tokens, all_logits=True)
    llm = LLM(model)
    close(llm.forward(tokens, all_logits=True), expected)
    close(llm.forward(tokens), expected[-1:])


@pytest.mark.parametrize("mode", ["dense", "exact"])
@pytest.mark.parametrize("type", TYPES)
def test_bits_do_not_depend_on_threads_or_runs(tiny_model, type, mode):
    model = tiny_model(type=type, act="relu", hidden=160, intermediate=992)
    results = []
    for threads in (1, 2, 3, 2):
        llm = LLM(model, mode=mode, n_threads=threads)
        results.append((llm.forward(TOKENS, all_logits=True), decode(llm, TOKENS)))
    for prefill, steps in results[1:]:
        assert np.array_equal(prefill, results[0][0])
        assert np.array_equal(steps, results[0][1])


@pytest.mark.parametrize("type", [t for t in TYPES if t.startswith("Q")])
@pytest.mark.parametrize("hidden", [32, 96, 416, 448])
def test_short_rows_side_by_side(tiny_model, type, hidden):
    """Threads cut the head in other places: what was computed side by side is then computed by itself."""
    model = tiny_model(type=type, hidden=hidden, vocab=6007)
    expected = decode(LLM(model, n_threads=1), TOKENS[:4])
    for threads in (2, 3, 5):
        assert np.array_equal(decode(LLM(model, n_threads=threads), TOKENS[:4]), expected)
    close(expected, decode(LLM(model, backend="naive"), TOKENS[:4]))


def test_threads_can_change(tiny_model):
    llm = LLM(tiny_model(), n_threads=1)
    before = decode(llm, TOKENS)
    llm.n_threads = 3
    assert llm.n_threads == 3
    assert np.array_equal(decode(llm, TOKENS), before)


def test_truncate_forgets(tiny_model):
    llm = LLM(tiny_model(type="Q8_0", act="relu"))
    cache = llm.new_cache(64)
    llm.forward(TOKENS[::-1], cache)
    cache.truncate(0)
    llm.forward(TOKENS[:30], cache)
    assert cache.n_past == 30
    first = llm.forward(TOKENS[30:], cache)
    cache.truncate(30)
    assert np.array_equal(llm.forward(TOKENS[30:], cache), first)
    close(first, LLM(tiny_model(type="Q8_0", act="relu"), backend="naive").forward(TOKENS))


def test_caches_are_independent(tiny_model):
    llm = LLM(tiny_model())
    expected = decode(llm, TOKENS[:10])
    one, two = llm.new_cache(16), llm.new_cache(16)
    for i in range(10):
        llm.forward(TOKENS[20 + i : 21 + i], two)
        assert np.array_equal(llm.forward(TOKENS[i : i + 1], one)[0], expected[i])


@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 160), (224, 544)])
@pytest.mark.parametrize("type", TYPES)
def test_too_dense_to_skip(tiny_model, type, hidden, intermediate):
    """Where nearly all neurons are active, exact mode turns into its dense twin, bit for bit."""
    model = tiny_model(type=type, act="fatrelu_-1e30", hidden=hidden, intermediate=intermediate)
    exact, dense = LLM(model, mode="exact"), LLM(model, mode="dense")
    cache = exact.new_cache(64)
    for token in TOKENS[:17]:
        exact.forward([token], cache)
    assert not exact._core.skipping
    assert "dense" in exact.mode_reason
    assert exact._core.weight_bytes == dense._core.weight_bytes
    assert np.array_equal(decode(exact, TOKENS), decode(dense, TOKENS))
    assert np.array_equal(exact.forward(TOKENS, all_logits=True), dense.forward(TOKENS, all_logits=True))


def test_sparse_enough_to_skip(tiny_model):
    llm = LLM(tiny_model(act="fatrelu_1.5"), mode="exact")
    decode(llm, TOKENS)
    assert llm.stats()["active"] < 0.3 * llm.stats()["neurons"]
    assert llm._core.skipping


def test_bytes_read_follow_sparsity(tiny_model):
    """Exact mode reads what its twin says it must, up to the padding of packed rows."""
    model = tiny_model(act="fatrelu_0.8", hidden=128, intermediate=512)
    read = {}
    for mode in ("dense", "exact"):
        twin, llm = LLM(model, backend="naive", mode=mode), LLM(model, mode=mode)
        decode(twin, TOKENS)
        decode(llm, TOKENS)
        read[mode] = llm.stats()["weight_bytes_read"]
        assert read[mode] == pytest.approx(twin.stats()["weight_bytes_read"], rel=0.02)
    assert read["exact"] < 0.85 * read["dense"]
    llm.forward(TOKENS)
    assert llm.stats()["weight_bytes_read"] == read["exact"], "prefill is counted apart"


def test_bad_calls_are_refused(tiny_model):
    llm = LLM(tiny_model())
    cache = llm.new_cache(8)
    for tokens in ([-1], [288], [0, 2**31 - 1], []):
        with pytest.raises(ValueError, match="token"):
            llm.forward(np.array(tokens, np.int32), cache)
    assert cache.n_past == 0
    llm.forward(TOKENS[:8], cache)
    with pytest.raises(ValueError, match="8"):
        llm.forward(TOKENS[:1], cache)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(9)


def test_bad_tensors_are_refused(tiny_model):
    from prosparse import _core
    from prosparse.engine.backend import core_config

    model = tiny_model()
    core = _core.Model(core_config(model.config), 1, "dense")
    name, tensor = "model.norm.weight", model.tensors["model.norm.weight"]
    with pytest.raises(ValueError, match="no_such"):
        core.set_tensor("model.no_such.weight", "F32", tensor.shape, tensor.data)
    with pytest.raises(ValueError, match=name):
        core.set_tensor(name, "F32", (95,), tensor.data)
    with pytest.raises(ValueError, match=name):
        core.set_tensor(name, "F32", tensor.shape, tensor.data[:-1])
    with pytest.raises(ValueError, match="Q4_K"):
        core.set_tensor(name, "Q4_K", tensor.shape, tensor.data)
    with pytest.raises(ValueError, match="missing"):
        core.finish()


def test_sparse_reference(sparse_path):
    """Its jumps of 0.5 turn any rounding into a few percent of the logits, so only averages can agree."""
    model = open_model(sparse_path)
    text = "The capital of France is Paris. A cache keeps what was used last near the processor, so that it "
    twin, llm = LLM(model, backend="naive"), LLM(model)
    assert llm.mode == "exact"
    ids = llm.tokenizer.encode(text * 4)
    expected = twin.logprobs(ids)
    assert np.mean(llm.logprobs(ids)) == pytest.approx(np.mean(expected), abs=0.05)
    want, got = twin.stats(), llm.stats()
    assert got["prefill_active"] == pytest.approx(want["prefill_active"], rel=0.01)
    assert got["prefill_active"] < 0.15 * got["prefill_neurons"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-42])
@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_what_is_not_finite_stays_visible(tiny_model, mode, value):
    """One broken weight gives NaN, not a fluent answer; a vanishing one changes nothing else."""
    model = tiny_model(type="Q8_0", act="relu")
    norm = model.tensors["model.layers.0.post_attention_layernorm.weight"]
    norm.data.view(np.float32)[:] = value
    llm = LLM(model, mode=mode)
    prefill = llm.forward(TOKENS[:9], all_logits=True)
    step = llm.forward(TOKENS[:1])
    assert np.isfinite(prefill).all() == np.isfinite(step).all() == (value == 1e-42)
