"""Packing and mixing: every block once an epoch, shares as asked, the same for any way of asking."""

from types import SimpleNamespace

import numpy as np
import pytest

from prosparse.sparsify.batches import Mixture

CONTEXT = 8


def store(n: int, first: int = 0, name: str = "a"):
    """Tokens first, first + 1, ...; documents of 5 tokens; every third token is to be learnt."""
    tokens = np.arange(first, first + n, dtype=np.uint32)
    offsets = np.array([*range(0, n, 5), n])
    return SimpleNamespace(tokens=tokens, loss=tokens % 3 == 0, offsets=offsets, source=name)


def mixture(stores, weights, seed=0, vocab_size=1 << 20):
    return Mixture(stores, weights, context=CONTEXT, seed=seed, vocab_size=vocab_size)


def test_an_epoch_holds_every_block_once_and_the_next_is_shuffled_anew():
    mix = mixture([store(8 * 50 + 1)], [1.0])
    assert mix.blocks(0) == 50
    epochs = [mix.batch(e * 50, 50).tokens[:, 0].tolist() for e in range(3)]
    for starts in epochs:
        assert sorted(starts) == list(range(0, 400, CONTEXT))
    assert epochs[0] != epochs[1] != epochs[2]


def test_contents():
    batch = mixture([store(1000)], [1.0]).batch(0, 16)
    assert batch.tokens.shape == batch.loss.shape == batch.document.shape == (16, CONTEXT + 1)
    assert (np.diff(batch.tokens, axis=1) == 1).all(), "targets are the next tokens"
    assert np.array_equal(batch.loss, batch.tokens % 3 == 0)
    assert np.array_equal(batch.document, batch.tokens // 5 - batch.tokens[:, :1] // 5)


def test_a_sequence_does_not_depend_on_how_it_is_asked_for():
    stores = [store(4000), store(900, first=10_000)]
    whole = mixture(stores, [3, 1]).batch(0, 200)
    late = mixture(stores, [3, 1]).batch(150, 50)  # a resumed run
    assert np.array_equal(whole.tokens[150:], late.tokens)
    halves = [mixture(stores, [3, 1]).batch(i, 1).tokens for i in (7, 3)]  # other ranks
    assert np.array_equal(whole.tokens[[7, 3]], np.concatenate(halves))
    other = mixture(stores, [3, 1], seed=1).batch(0, 200)
    assert not np.array_equal(whole.tokens, other.tokens)


def test_shares():
    mix = mixture([store(4000), store(900, first=10_000)], [3, 1])
    first = mix.batch(0, 40_000).tokens[:, 0]
    assert np.mean(first < 10_000) == pytest.approx(0.75, abs=0.01)
    # far beyond the first chunk of choices, still every block of the small source equally often
    small = first[first >= 10_000]
    _, counts = np.unique(small, return_counts=True)
    assert counts.max() - counts.min() <= 1


def test_noise_is_in_every_second_sequence():
    noisy = Mixture([store(4000)], [1.0], context=CONTEXT, seed=0, vocab_size=4000, held_out=4, noise=0.25)
    held = noisy.held_out(0)
    assert (np.diff(held.tokens, axis=1) == 1).all(), "held-out text stays what it is"
    # blocks are others where some are held out
    plain = Mixture([store(4000)], [1.0], context=CONTEXT, seed=0, vocab_size=4000, held_out=4)
    before, after = plain.batch(0, 400), noisy.batch(0, 400)
    changed = before.tokens != after.tokens
    assert not changed[::2].any()
    assert changed[1::2].mean() == pytest.approx(0.25, abs=0.03)
    put = after.tokens[changed]
    assert put.min() < 400 and 3600 < put.max() < 4000, "of the whole vocabulary"
    assert np.array_equal(before.loss, after.loss)
    for first, count in ((7, 1), (100, 3), (101, 2)):  # however it is asked for
        assert np.array_equal(noisy.batch(first, count).tokens, after.tokens[first : first + count])


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_of_noise_that_cannot_be(share):
    with pytest.raises(ValueError, match="noise"):
        Mixture([store(100)], [1.0], context=CONTEXT, seed=0, vocab_size=4000, noise=share)


@pytest.mark.parametrize(
    ("stores", "weights", "match"),
    [
        ([], [], "give one of each"),
        ([store(100)], [1, 2], "give one of each"),
        ([store(8)], [1], "8 tokens, one sequence needs 9"),
        ([store(100, first=1 << 20)], [1], "wrong tokenizer"),
    ],
)
def test_bad_mixtures(stores, weights, match):
    with pytest.raises(ValueError, match=match):
        mixture(stores, weights)
