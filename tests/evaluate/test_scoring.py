"""From texts to tokens, and from log-probabilities to accuracies."""

import math
from dataclasses import replace

import numpy as np
import pytest

from prosparse.evaluate import scoring
from prosparse.evaluate.scoring import Request, Score
from prosparse.evaluate.tasks.reading import Item
from prosparse.model.tokenizer import Tokenizer
from tiny import byte_tokenizer

BOS = 256


def tokenizer_of(add_bos: bool, *, bos: bool = True) -> Tokenizer:
    data = byte_tokenizer(288)
    metadata = dict(data.gguf) | {"tokenizer.ggml.add_bos_token": add_bos}
    if not bos:
        del metadata["tokenizer.ggml.bos_token_id"]
    return Tokenizer.build(replace(data, gguf=metadata))


class Words:
    """A tokenizer of whole words, each with the blanks before it; merges what the real ones would."""

    bos_id, add_bos = None, False

    def __init__(self, *words: str) -> None:
        self.words = words

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            found = max((w for w in self.words if text.startswith(w)), key=len)
            ids.append(self.words.index(found))
            text = text[len(found) :]
        return ids


def test_leading_space_belongs_to_the_option():
    assert scoring.split(tokenizer_of(False), "a:", " b") == Request(tuple(b"a:"), tuple(b" b"))


def test_white_space_at_the_end_of_the_context_belongs_to_the_option():
    assert scoring.split(tokenizer_of(False), "a: \n", " b") == Request(tuple(b"a:"), tuple(b" \n b"))


def test_bos_once():
    assert scoring.split(tokenizer_of(True), "a", " b") == Request((BOS, *b"a"), tuple(b" b"))


@pytest.mark.parametrize("add_bos", [True, False])
def test_an_empty_context_is_bos(add_bos):
    assert scoring.split(tokenizer_of(add_bos), "", " b") == Request((BOS,), tuple(b" b"))


def test_an_empty_context_without_bos_is_refused():
    with pytest.raises(ValueError, match="' b' has no context"):
        scoring.split(tokenizer_of(False, bos=False), "", " b")


def test_tokens_across_the_boundary():
    """The whole is split as one text; as many tokens as the context has alone are the context's."""
    assert scoring.split(Words("a", "b", " ", "b "), "ab", " b") == Request((0, 1), (1,))  # "a", "b ", "b"
    with pytest.raises(ValueError, match="belongs to"):
        scoring.split(Words("a", " b", "a b"), "a", " b")


def test_long_contexts_are_cut_on_the_left_behind_bos():
    items = [Item((("abcdef", "x"), ("ab", "x")))]
    requests, cut = scoring.encode(items, tokenizer_of(True), 5)
    # fed are 5 tokens: BOS, three of the context, and the blank
    assert requests[0] == Request((BOS, *b"def"), tuple(b" x"))
    assert requests[1] == Request((BOS, *b"ab"), tuple(b" x"))
    assert cut == 1
    requests, cut = scoring.encode(items, tokenizer_of(False), 5)
    assert requests[0] == Request(tuple(b"cdef"), tuple(b" x")) and cut == 1
    with pytest.raises(ValueError, match=r"option of 6 tokens.*holds 5"):
        scoring.encode([Item((("ab", "cdefg"),))], tokenizer_of(True), 5)


def scores(*logprobs: float) -> list[Score]:
    return [Score(logprob, False) for logprob in logprobs]


def item(gold: int, *options: str) -> Item:
    return Item(tuple(("q", option) for option in options), gold)


def test_acc_sums_and_acc_norm_divides_by_characters():
    items = [item(0, "ab", "abcd"), item(1, "ab", "abcd"), item(1, "é", "ü")]
    found = scoring.result(items, scores(-4, -6, -4, -6, -2, -1))
    assert found.n == 3 and found.acc == pytest.approx(2 / 3) and found.acc_norm == pytest.approx(2 / 3)
    assert found.acc_stderr == pytest.approx(np.std([1, 0, 1], ddof=1) / math.sqrt(3))
    assert found.ppl is None


def test_the_first_of_equals_is_chosen():
    found = scoring.result([item(0, "a", "a"), item(1, "a", "a")], scores(-1, -1, -1, -1))
    assert found.acc == found.acc_norm == 0.5


def test_single_options_are_right_when_greedy():
    items = [item(0, "a"), item(0, "b"), item(0, "c")]
    found = scoring.result(items, [Score(-1.0, True), Score(-2.0, False), Score(-6.0, True)])
    assert found.acc == pytest.approx(2 / 3) and found.acc_norm is None
    assert found.ppl == pytest.approx(math.exp(3))
    assert found.ppl_stderr == pytest.approx(math.exp(3) * np.std([1, 2, 6], ddof=1) / math.sqrt(3))


def test_one_item_has_no_error():
    assert scoring.result([item(0, "a", "b")], scores(-1, -2)).acc_stderr == 0


class FakeRunner:
    """Scores by a function, and remembers what it was asked."""

    n_ctx = 100

    def __init__(self, of) -> None:
        self.tokenizer = tokenizer_of(True)
        self.of = of
        self.asked: list[Request] = []

    def score(self, requests, progress=None):
        self.asked += requests
        return [Score(self.of(request), True) for request in requests]


def test_duplicated_options_get_one_score():
    """Even where a runner would never say the same twice."""
    noise = iter(range(100))
    runner = FakeRunner(lambda _: -float(next(noise)) - 1)
    items = [item(1, "same", "same", "z"), item(0, "same", "other")]
    found = scoring.evaluate(items, runner)
    assert len(runner.asked) == 3
    assert found.acc == 0.5


def test_what_cannot_be_evaluated():
    with pytest.raises(ValueError, match="no items"):
        scoring.evaluate([], FakeRunner(lambda _: 0.0))
    with pytest.raises(ValueError, match="not finite"):
        scoring.evaluate([item(0, "a", "b")], FakeRunner(lambda _: math.nan))
