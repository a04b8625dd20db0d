"""Deltas are whole characters, and together what decoding at once gives."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from transformers import AutoTokenizer

from gateway.api.answer import logprobs_json
from gateway.output.detokenizer import ALPHABET, ByteLevel, Pieces, Vocabulary, Windowed, spell
from gateway.output.events import TextLogprobs, TokenLogprob
from gateway.prompt.tokenizer import Tokenizer
from tests import vocabularies as v

KINDS = {"demo": ByteLevel, "byte level": ByteLevel, "sentencepiece": Pieces, "other": Windowed}


@cache
def made(kind: str) -> tuple[Vocabulary, Backend]:
    directory = Path(tempfile.mkdtemp())
    if kind == "demo":
        directory = v.DEMO
    elif kind == "byte level":
        v.byte_level(directory)
    else:
        v.sentencepiece(directory)
    if kind == "other":  # A decoder that no table knows.
        file = directory / "tokenizer.json"
        spec = json.loads(file.read_text())
        spec["decoder"] = {"type": "Metaspace", "replacement": v.SPACE, "prepend_scheme": "always"}
        spec["decoder"]["split"] = False
        file.write_text(json.dumps(spec))
    plain = Backend.from_file(str(directory / "tokenizer.json"))
    return Vocabulary(Tokenizer.load(directory)), plain


def deltas(vocabulary: Vocabulary, ids: list[int], skip: bool) -> list[str]:
    detokenizer = vocabulary.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_recognised(kind: str) -> None:
    assert type(made(kind)[0].detokenizer()) is KINDS[kind]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=80, deadline=None)
@given(text=ANY_TEXT)
def test_encoded_text_comes_back_in_whole_characters(kind: str, skip: bool, text: str) -> None:
    vocabulary, plain = made(kind)
    ids = plain.encode(text).ids
    pieces = deltas(vocabulary, ids, skip)
    assert "".join(pieces) == plain.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("kind", ["demo", "byte level"])
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_decode_as_at_once(kind: str, skip: bool, data: st.DataObject) -> None:
    """Also ids that spell no valid UTF-8, special ones, and ids that have no token."""
    vocabulary, plain = made(kind)
    size = plain.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 5), max_size=40))
    assert "".join(deltas(vocabulary, ids, skip)) == plain.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_sentencepiece_ids_decode_as_at_once(skip: bool, data: st.DataObject) -> None:
    """Runs of byte tokens are whole characters here; what is broken has a test of its own."""
    vocabulary, plain = made("sentencepiece")
    words = st.sampled_from([i for i in range(plain.get_vocab_size()) if not 3 <= i < 259])
    runs = st.characters(exclude_categories=["Cs"]).map(lambda c: [3 + b for b in c.encode()])
    chunks = data.draw(st.lists(st.one_of(words.map(lambda i: [i]), runs), max_size=20))
    ids = [i for chunk in chunks for i in chunk]
    assert "".join(deltas(vocabulary, ids, skip)) == plain.decode(ids, skip_special_tokens=skip)


def test_a_character_waits_for_its_bytes() -> None:
    vocabulary, plain = made("byte level")
    ids = plain.encode("🤗").ids
    pieces = deltas(vocabulary, ids, True)
    assert len(ids) > 1
    assert [p for p in pieces if p] == ["🤗"]
    assert pieces[-2] == "🤗"  # With its last token, not only at the end.


def test_cut_characters_become_replacements_at_the_end() -> None:
    for kind in ("byte level", "sentencepiece"):
        vocabulary, plain = made(kind)
        ids = plain.encode("a 🤗", add_special_tokens=False).ids[:-1]
        pieces = deltas(vocabulary, ids, True)
        assert "".join(pieces[:-1]) == "a "
        assert set(pieces[-1]) == {"\ufffd"}
        assert "".join(pieces) == plain.decode(ids)


def test_broken_byte_tokens_become_one_replacement_each() -> None:
    vocabulary, plain = made("sentencepiece")
    a = plain.token_to_id("a")
    for run in ([0xFF, 0xFE], [0xE4, 0xBD], [0xC3, 0xC3]):
        ids = [a, *(3 + byte for byte in run), a]
        assert (
            "".join(deltas(vocabulary, ids, True))
            == plain.decode(ids)
            == "a" + "\ufffd" * len(run) + "a"
        )
    late = [a, 3 + 0xC3, 3 + 0xA9, 3 + 0xFF, a]  # A whole character, shown before the broken byte.
    assert "".join(deltas(vocabulary, late, True)) == "aé\ufffda"


def test_hugging_face_decodes_the_same() -> None:
    tokenizer = AutoTokenizer.from_pretrained(v.DEMO)
    vocabulary = made("demo")[0]
    ids = tokenizer("A red square is <|im_end|> above é 你好.")["input_ids"]
    for skip in (True, False):
        assert "".join(deltas(vocabulary, ids, skip)) == tokenizer.decode(
            ids, skip_special_tokens=skip
        )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_as_log_probabilities_show_them(kind: str) -> None:
    vocabulary, plain = made(kind)
    ids = plain.encode("the é🤗 cat", add_special_tokens=False).ids
    joined = b"".join(vocabulary.token_bytes(i) for i in ids).decode("utf-8", "replace")
    if kind != "other":  # Its decoder strips what stands first.
        assert joined.strip() == "the é🤗 cat"
    for token_id in (*ids, *list(vocabulary.special_ids)[:2]):
        spelled = vocabulary.token_bytes(token_id)
        shown = logprobs_json([TextLogprobs(TokenLogprob(spelled, -1.0))])
        assert shown is not None
        assert shown["content"][0]["token"] == spelled.decode("utf-8", "replace")
    assert vocabulary.token_bytes(10**6) == b""


def test_the_byte_alphabet_is_the_librarys() -> None:
    backend = decoders.ByteLevel()
    assert len(ALPHABET) == 256
    for character, byte in ALPHABET.items():
        assert spell(character) == bytes([byte])
        if byte < 128:
            assert backend.decode([character]) == chr(byte)
    assert spell("<tool call>") == b"<tool call>"


def held(detokenizer: object) -> int:
    """How much of what was pushed a detokenizer still has."""
    parts = [value for value in vars(detokenizer).values() if isinstance(value, list | bytearray)]
    if isinstance(detokenizer, ByteLevel):
        parts.append(bytearray(detokenizer._decoder.getstate()[0]))
    return sum(len(part) for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_late_in_a_long_answer(kind: str) -> None:
    """Nothing that was said is kept, so nothing of it is looked at again."""
    vocabulary, plain = made(kind)
    ids = plain.encode("the quick brown fox é ").ids * 50
    detokenizer = vocabulary.detokenizer()
    for token_id in ids:
        detokenizer.push(token_id)
        assert held(detokenizer) <= 2 * Windowed.LONGEST
