"""Stop strings: found across deltas, shown up to their start, counted to the token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.output.detokenizer import Vocabulary
from gateway.output.stops import OutputText, StopMatcher
from gateway.prompt.tokenizer import Tokenizer
from tests import vocabularies as v


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(Tokenizer.load(v.DEMO))


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    matcher, shown = StopMatcher(stops), []
    for piece in pieces:
        text, found, _ = matcher.push(piece)
        shown.append(text)
        if found is not None:
            return shown, found
    shown.append(matcher.flush())
    return shown, None


def test_a_stop_string_across_pieces() -> None:
    assert run(["one st", "o", "p two"], ["stop"]) == (["one ", "", ""], "stop")


def test_only_what_could_begin_a_stop_string_waits() -> None:
    assert run(["abs", "x", "st"], ["stop"]) == (["ab", "sx", "", "st"], None)


def test_the_match_that_ends_first_wins_then_the_longer() -> None:
    assert run(["say hello world"], ["hello world", "lo w"])[1] == "lo w"
    assert run(["abc"], ["c", "bc", "abc"]) == ([""], "abc")


def test_overlapping_beginnings() -> None:
    assert run(list("aaab"), ["aab"]) == (["", "", "a", ""], "aab")


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_pieces_change_nothing(pieces: list[str], stops: list[str]) -> None:
    """The same text is shown as when it comes a character at a time, and it is the text before
    the first stop string to be completed."""
    text = "".join(pieces)
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stops)]
    shown, found = run(pieces, stops)
    one_by_one, same = run(list(text), stops)
    if not ends:
        assert ("".join(shown), found) == ("".join(one_by_one), same) == (text, None)
    else:
        longest = max((s for s in stops if text[: ends[0]].endswith(s)), key=len)
        before = text[: ends[0] - len(longest)]
        assert ("".join(shown), found) == ("".join(one_by_one), same) == (before, longest)


def test_tokens_are_counted_up_to_the_match(vocabulary: Vocabulary) -> None:
    ids = vocabulary.tokenizer.encode("red square blue circle green")
    output = OutputText(vocabulary, ["blue"])
    piece = output.push(ids)
    assert piece.text == "red square "
    assert piece.stop == output.stopped == "blue"
    assert vocabulary.tokenizer.decode(ids[: piece.num_tokens]).endswith("blue")
    assert not vocabulary.tokenizer.decode(ids[: piece.num_tokens - 1]).endswith("blue")
    assert output.num_tokens == piece.num_tokens
    assert output.push([1, 2]).num_tokens == 0
    assert output.finish().text == ""


@pytest.mark.parametrize("include", [True, False])
def test_the_stop_string_is_shown_on_request(vocabulary: Vocabulary, include: bool) -> None:
    ids = vocabulary.tokenizer.encode("one two three")
    output = OutputText(vocabulary, ["two"], include_stop=include)
    shown = "".join(output.push([i]).text for i in ids)
    assert shown == ("one two" if include else "one ")


def test_the_end_shows_what_waited(vocabulary: Vocabulary) -> None:
    ids = vocabulary.tokenizer.encode("wait for st")
    output = OutputText(vocabulary, ["stop"])
    assert output.push(ids).text == "wait for "
    assert output.finish().text == "st"
    assert output.num_tokens == len(ids)


def test_min_tokens_are_not_searched(vocabulary: Vocabulary) -> None:
    ids = vocabulary.tokenizer.encode("stop one stop two")
    first = len(vocabulary.tokenizer.encode("stop"))
    output = OutputText(vocabulary, ["stop"], min_tokens=first)
    shown = output.push(ids)
    assert shown.text == "stop one "
    assert shown.stop == "stop"


def test_special_tokens_are_shown_on_request(vocabulary: Vocabulary) -> None:
    for skip, text in ((True, "hi"), (False, "hi<|im_end|>")):
        output = OutputText(vocabulary, skip_special_tokens=skip)
        ids = [*vocabulary.tokenizer.encode("hi"), 629]
        assert output.push(ids).text + output.finish().text == text


def test_a_stop_token_counts_without_text(vocabulary: Vocabulary) -> None:
    output = OutputText(vocabulary)
    output.push(vocabulary.tokenizer.encode("hi"))
    before = output.num_tokens
    output.count_hidden()
    assert output.num_tokens == before + 1
    assert output.finish().text == ""


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(1, 5), max_size=30))
def test_deltas_add_up(vocabulary: Vocabulary, text: str, cuts: list[int]) -> None:
    ids = vocabulary.tokenizer.encode(text)
    output, shown, rest = OutputText(vocabulary, ["\0\0"]), "", ids
    for cut in [*cuts, len(ids)]:
        shown += output.push(rest[:cut]).text
        rest = rest[cut:]
    if "\0\0" not in text:
        assert shown + output.finish().text == text
