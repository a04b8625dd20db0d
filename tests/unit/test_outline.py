"""Long bodies: read as a parser reads them, in steps that are short and memory that is small."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from gateway.api.chat import ChatRequest
from gateway.api.schemas import long_json as outline
from gateway.api.schemas.long_json import count_values, split_long_strings
from gateway.api.schemas.parsing import parse
from gateway.edge.limits import MAX_NAME_CHARACTERS, MAX_OUTLINE_BYTES
from opticnerve.errors import InvalidRequest, OpticNerveError, PayloadTooLarge

PLENTY = 10**9
TEXT = st.text(st.sampled_from('ab,[{:"\\\n\u00e9\u4f60\U0001f600'), max_size=60)
JSON = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)
DAMAGE = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(b'"\\u[,d8\x80\x01 ')), max_size=2
)


def whole(text: bytes) -> Any:
    """What ``text`` is, or that it is nothing."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return OpticNerveError


def by_outline(text: bytes | bytearray, enough: int = PLENTY) -> Any:
    try:
        return split_long_strings(text, enough).read()
    except (ValueError, InvalidRequest):
        return OpticNerveError


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    value=JSON,
    damage=DAMAGE,
    ascii=st.booleans(),
    long=st.sampled_from([1, 8, 64]),
    piece=st.integers(33, 50),
)
@example("\\" * 60, [], True, 1, 33)
@example("\U0001f600" * 60, [], True, 1, 33)
@example("\U0001f600" * 60, [], False, 1, 34)
def test_an_outline_reads_what_the_text_says(
    value: Any, damage: Any, ascii: bool, long: int, piece: int
) -> None:
    text = bytearray(json.dumps(value, ensure_ascii=ascii).encode())
    for place, byte in damage:
        text[place % len(text)] = byte
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outline, "LONG", long)
        patch.setattr(outline, "PIECE_BYTES", piece)
        assert by_outline(text) == by_outline(bytes(text)) == whole(bytes(text))
        if not damage:
            assert split_long_strings(text, PLENTY).values == count_values(text, PLENTY)


def body(field: str, value: str) -> bytearray:
    text = '{"model": "model", "messages": [{"role": "user", "content": "hi"}], "%s": %s}'
    return bytearray((text % (field, value)).encode())


def message(content: str) -> bytearray:
    return bytearray(b'{"model": "model", "messages": [{"role": "user", "content": %b}]}') % (
        content.encode()
    )


URL = '[{"type": "image_url", "image_url": {"url": "data:;base64,%s"}}]'
NASTY: dict[str, Callable[[int], bytearray]] = {
    "picture": lambda size: message(URL % ("A" * size)),
    "escaped slashes": lambda size: message(URL % ("A\\/" * (size // 3))),
    "text": lambda size: message('"%s"' % ("a" * size)),
    "escapes": lambda size: message('"%s"' % ("\\u0041" * (size // 6))),
    "quotes": lambda size: message('"%s"' % ('\\"' * (size // 2))),
    "backslashes": lambda size: message('"%s"' % ("\\\\" * (size // 2))),
    "an emoji": lambda size: message('"%s\U0001f600"' % ("a" * size)),
    "halves": lambda size: message('"%s"' % ("\\ud800" * (size // 6))),
    "no end": lambda size: message('"%s' % ("a" * size)),
    "strings": lambda size: bytearray(b'""' * (size // 2)),
    "white space": lambda size: bytearray(b" " * size) + message('"a"'),
    "integers": lambda size: body("metadata", "[%s1]" % (("9" * 4200 + ",") * (size // 4201))),
    "deep": lambda size: body("metadata", "[" * size),
    "short strings": lambda size: body(
        "metadata", "[%s1]" % (('"%s",' % ("a" * 700)) * (size // 703))
    ),
    "a name": lambda size: body("a" * size, "1"),
    "names": lambda size: body(
        "metadata", '{%s"a":1}' % (('"%s":1,' % ("a" * 700)) * (size // 705))
    ),
    "arguments": lambda size: (
        message('null, "tool_calls": [{"function": {"name": "f", "arguments": "%s"}}]')
        % (('{\\"a\\": \\"%s\\"}' % ("a" * size)).encode(),)
    ),
    "a model's name": lambda size: body("user", '"%s"' % ("a" * size)),
    "stop": lambda size: body("stop", '"%s"' % ("a" * size)),
}


def nasty(kind: str, size: int) -> bytearray:
    """A body of about ``size`` bytes."""
    return NASTY[kind](size)


def read(text: bytearray) -> None:
    """As the gateway reads a long body, whatever it says of it."""
    drawn = split_long_strings(text, 100_000)
    if drawn.values <= 100_000:
        parse(ChatRequest, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NASTY)
def test_a_long_body_takes_three_times_its_bytes_at_most(kind: str) -> None:
    """Besides itself: its strings, and pieces of one; an object's names again; 400 bytes a value;
    a text with an emoji four bytes a character."""
    text = nasty(kind, 2**23)
    tracemalloc.start()
    try:
        try:
            read(text)
        except OpticNerveError as error:
            assert error.http_status in (400, 413)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (6 if kind == "an emoji" else 3) * len(text) + 2**22


def steps_are_short(work: Callable[[], object], seconds: float) -> bool:
    """Whether ``work``, in a thread, takes no more CPU between two turns of this one, which asks
    for the interpreter's lock all the time. Tried again, since this one may sleep too long."""
    return any(_longest_step(work) < seconds for _ in range(4))


def _longest_step(work: Callable[[], object]) -> float:
    begin = threading.Event()

    def run() -> None:
        begin.wait()
        try:
            work()
        except OpticNerveError as error:
            assert error.http_status in (400, 413)

    thread = threading.Thread(target=run)
    thread.start()
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    longest, before = 0.0, time.clock_gettime(clock)
    begin.set()
    while thread.is_alive():
        try:
            now = time.clock_gettime(clock)
        except OSError:  # It has ended meanwhile.
            break
        longest, before = max(longest, now - before), now
        time.sleep(0.0005)
    thread.join()
    return longest


SLOW = ("escaped slashes", "escapes", "quotes", "backslashes", "an emoji", "halves", "integers")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_a_long_body_is_read_in_short_steps(kind: str) -> None:
    """In one step of a parser these took 80 to 400 ms."""
    text = nasty(kind, 2**25)
    assert steps_are_short(lambda: read(text), 0.06)


def test_no_step_of_the_parser_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def parsed(text: bytes, **options: Any) -> Any:
        lengths.append(len(text))
        return from_json(text, **options)

    monkeypatch.setattr(outline, "from_json", parsed)
    for kind in NASTY:
        try:
            read(nasty(kind, 2**23))
        except OpticNerveError:
            continue
    assert max(lengths) <= MAX_OUTLINE_BYTES


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (nasty("white space", 2**23), PayloadTooLarge, "besides long strings"),
        (nasty("integers", 2**23), PayloadTooLarge, "besides long strings"),
        (nasty("an emoji", 2**25), PayloadTooLarge, "more than 16777216 characters"),
        (nasty("halves", 2**23), InvalidRequest, "half of a surrogate pair"),
        (nasty("no end", 2**23), InvalidRequest, "no end"),
        (nasty("strings", 2**23), InvalidRequest, "strings follow"),
        (nasty("a name", 2**23), InvalidRequest, f"longer than {MAX_NAME_CHARACTERS} characters"),
        (message('"%s\x01"' % ("a" * 1000)), InvalidRequest, "control character"),
        (message('"%s\\x"' % ("a" * 1000)), InvalidRequest, "escape"),
        (message('"%s", ' % ("a" * 1000)), InvalidRequest, "not valid JSON: "),
        (bytearray(b'["%s"]' % (b"a" * 1000)), InvalidRequest, "should be a JSON object"),
    ],
)
def test_what_is_wrong_with_a_long_body(
    text: bytearray, error: type[OpticNerveError], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        read(text)
    assert type(caught.value) is error
    assert len(caught.value.message) < 300 and "aaa" not in caught.value.message
    assert "column" not in caught.value.message


def test_a_byte_order_mark_before_a_long_body() -> None:
    text = b"\xef\xbb\xbf" + bytes(message('"%s"' % ("a" * 1000)))
    request, _ = parse(ChatRequest, split_long_strings(text, PLENTY))
    assert request.messages[0].content == "a" * 1000
