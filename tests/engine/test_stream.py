from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prosparse.engine.stream import TextStream


def stream(chunks: list[bytes], stop: list[str] | str = ()) -> tuple[list[str], str | None]:
    text = TextStream(stop)
    pieces = [text.push(chunk) for chunk in chunks]
    return [*pieces, text.finish()], text.stopped


def test_characters_come_whole() -> None:
    pieces, stopped = stream([b"\xf0", b"\x9f\xa6", b"\x99!", b"\xe4\xb8", b"\xad"])
    assert pieces == ["", "", "🦙!", "", "中", ""] and stopped is None


def test_unfinished_character_at_the_end() -> None:
    assert stream([b"ab\xe4\xb8"])[0] == ["ab", "\ufffd"]


def test_broken_bytes_do_not_hold_up_the_rest() -> None:
    assert stream([b"a\xff", b"b"])[0] == ["a\ufffd", "b", ""]


def test_stop_string_across_tokens() -> None:
    pieces, stopped = stream([b"Hello <", b"/", b"s", b"> more", b"text"], ["</s>"])
    assert pieces == ["Hello ", "", "", "", "", ""] and stopped == "</s>"


def test_possible_stop_is_released_when_it_is_none() -> None:
    pieces, stopped = stream([b"a\n", b"\nUs", b"ual", b"\n"], ["\n\nUser"])
    assert pieces == ["a", "", "\n\nUsual", "", "\n"] and stopped is None


def test_stop_may_start_inside_a_failed_start() -> None:
    assert stream([b"aa", b"ab!"], ["aab"]) == (["", "a", ""], "aab")


def test_first_complete_stop_wins() -> None:
    for chunks in ([b"xabcy"], [b"xab", b"cy"], [b"x", b"a", b"b", b"c", b"y"]):
        pieces, stopped = stream(chunks, ["abc", "b"])
        assert ("".join(pieces), stopped) == ("xa", "b")
        pieces, stopped = stream(chunks, ["bc", "abc"])
        assert ("".join(pieces), stopped) == ("x", "abc"), "both end together: the longer one"


def test_stop_may_be_one_string() -> None:
    assert stream([b"one two"], "two") == (["one ", ""], "two")
    with pytest.raises(ValueError, match="empty stop string"):
        TextStream(["a", ""])


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=8))
def test_any_bytes_cut_anywhere(data: bytes, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[a:b] for a, b in pairwise(bounds)]
    assert "".join(stream(chunks)[0]) == data.decode(errors="replace")


@given(
    st.text("ab🦙", max_size=20),
    st.lists(st.text("ab🦙", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_stops_do_not_depend_on_tokens(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces, stopped = stream([data[a:b] for a, b in pairwise(bounds)], stops)
    # the shortest beginning of the text that ends with a stop string
    ends = [(end, s) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    if ends:
        end = ends[0][0]
        longest = max((s for e, s in ends if e == end), key=len)
        assert ("".join(pieces), stopped) == (text[: end - len(longest)], longest)
    else:
        assert ("".join(pieces), stopped) == (text, None)
