"""Streaming detokenization: every delta is whole characters, and the deltas together equal the
decoding of all ids at once.

Two kinds of vocabulary are decoded by table, a token at a time: byte-level BPE, where a token
spells bytes, and sentencepiece with byte fallback, where a token is text or the name of one byte.
For others the library decodes a short window of tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from gateway.output.events import TokenLogprob
from gateway.prompt.tokenizer import Tokenizer
from opticnerve.generation.values import Logprob

REPLACEMENT = "\ufffd"
BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """The state of decoding one choice."""

    def push(self, token_id: int) -> str:
        """The characters that ``token_id`` completes; often one token's text, sometimes none."""
        ...

    def flush(self) -> str:
        """The text still held at the end: U+FFFD for bytes of an incomplete character, else
        nothing."""
        ...


class Vocabulary:
    """The text of a checkpoint's tokens. Shared by all requests; its tables fill as ids appear."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | int] = {}
        spec = tokenizer.decoder_spec
        self.byte_level = spec is not None and spec.get("type") == "ByteLevel"
        self.pieces = _piece_rules(spec)

    def detokenizer(
        self, *, skip_special_tokens: bool = True, shown_ids: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A new choice's detokenizer. ``shown_ids``: special tokens that are not skipped."""
        skipped = self.tokenizer.skipped_ids - shown_ids if skip_special_tokens else frozenset()
        if self.byte_level:
            return ByteLevel(self, skipped)
        if self.pieces is not None:
            return Pieces(self, skipped, self.pieces.strip_left)
        return Windowed(self, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token spells within a text; b"" for an id without a token."""
        if self.byte_level:
            return self.spelled_bytes(token_id)
        if self.pieces is not None:
            piece = self.piece(token_id)
            return bytes([piece]) if isinstance(piece, int) else piece.encode()
        return self.tokenizer.decode([token_id]).encode()

    def spelled(self, token_id: int, *, as_id: bool) -> bytes:
        """A token's name in log-probabilities: its bytes, or with ``as_id`` ``token_id:ID``."""
        return f"token_id:{token_id}".encode() if as_id else self.token_bytes(token_id)

    def spelled_logprob(self, token: Logprob, *, as_id: bool) -> TokenLogprob:
        spelled = self.spelled(token.token_id, as_id=as_id)
        return TokenLogprob(spelled, token.logprob, token.token_id, token.rank)

    def located(self, token_ids: Iterable[int]) -> tuple[str, list[int]]:
        """The text of all tokens, special ones included, and the position at which each begins, in
        characters."""
        detokenizer = self.detokenizer(skip_special_tokens=False)
        pieces: list[str] = []
        starts: list[int] = []
        total = 0
        for token_id in token_ids:
            starts.append(total)
            pieces.append(detokenizer.push(token_id))
            total += len(pieces[-1])
        return "".join([*pieces, detokenizer.flush()]), starts

    def spelled_bytes(self, token_id: int) -> bytes:
        """Byte-level BPE: the bytes that a token's characters stand for."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = spell(self.tokenizer.token_of(token_id) or "")
        return found

    def piece(self, token_id: int) -> str | int:
        """Sentencepiece: a token's text, or the one byte that it names."""
        found = self._pieces.get(token_id)
        if found is None:
            token = self.tokenizer.token_of(token_id) or ""
            byte = BYTE_NAME.fullmatch(token)
            assert self.pieces is not None
            found = int(byte.group(1), 16) if byte else self.pieces.replace(token)
            self._pieces[token_id] = found
        return found


class ByteLevel:
    """Byte-level BPE: the tokens' bytes through an incremental UTF-8 decoder."""

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int]) -> None:
        self._bytes = vocabulary.spelled_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class Pieces:
    """Sentencepiece. A run of byte tokens becomes characters as soon as they are complete; each
    byte that cannot be part of a character becomes U+FFFD."""

    def __init__(
        self, vocabulary: Vocabulary, skipped: frozenset[int], strip_left: int = 0
    ) -> None:
        self._piece = vocabulary.piece
        self._skipped = skipped
        self._strip = strip_left  # Spaces still to remove from the start of the text.
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        if isinstance(piece, int):
            self._run.append(piece)
            return self._stripped(self._characters())
        return self._stripped(self.flush() + piece)

    def flush(self) -> str:
        left = REPLACEMENT * len(self._run)
        self._run.clear()
        return left

    def _characters(self) -> str:
        """Removes the complete characters from the start of the run and returns them."""
        text = ""
        while self._run:
            try:
                text += self._run.decode()
                self._run.clear()
            except UnicodeDecodeError as error:
                text += self._run[: error.start].decode()
                del self._run[: error.start]
                if error.reason == "unexpected end of data":
                    break
                bad = error.end - error.start
                text += REPLACEMENT * bad
                del self._run[:bad]
        return text

    def _stripped(self, text: str) -> str:
        """Removes leading spaces of the whole text, which come from the first token's word mark."""
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class Windowed:
    """Runs the library's decoder over the tokens since text was last shown. Text that ends in
    U+FFFD may end in an incomplete character, so it is held back, for at most LONGEST tokens."""

    LONGEST = 16  # Most tokens of one character; more than any vocabulary needs.

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int]) -> None:
        self._decode = vocabulary.tokenizer.decode
        self._skipped = skipped
        self._before: list[int] = []  # Already shown; context for the decoder.
        self._now: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._now.append(token_id)
        shown, text = self._texts()
        if text.endswith(REPLACEMENT) and len(self._now) < self.LONGEST:
            return ""
        return self._advance(shown, text)

    def flush(self) -> str:
        return self._advance(*self._texts()) if self._now else ""

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._before), self._decode(self._before + self._now)

    def _advance(self, shown: str, text: str) -> str:
        self._before, self._now = self._now, []
        return text[len(shown) :]


class PieceRules:
    """A sentencepiece decoder's replacements in each token's text, and the number of spaces that it
    removes from the start of the whole text."""

    def __init__(self, replacements: Sequence[tuple[str, str]], strip_left: int) -> None:
        self.replacements = tuple(replacements)
        self.strip_left = strip_left

    def replace(self, token: str) -> str:
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token


def _piece_rules(spec: Mapping[str, Any] | None) -> PieceRules | None:
    """The rules of ``Sequence[Replace..., ByteFallback, Fuse, Strip]``; None for others."""
    if spec is None or spec.get("type") != "Sequence":
        return None
    steps = list(spec["decoders"])
    kinds = [step["type"] for step in steps]
    replacements = []
    while kinds and kinds[0] == "Replace" and "String" in steps[0]["pattern"]:
        replacements.append((steps[0]["pattern"]["String"], steps[0]["content"]))
        del kinds[0], steps[0]
    if kinds == ["ByteFallback", "Fuse"]:
        return PieceRules(replacements, 0)
    if kinds == ["ByteFallback", "Fuse", "Strip"]:
        strip = steps[2]
        if strip["content"] == " " and strip["stop"] == 0:
            return PieceRules(replacements, int(strip["start"]))
    return None


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes for the 256 bytes.

    Printable Latin-1 stands for itself; the other bytes take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


ALPHABET = _byte_alphabet()


def spell(token: str) -> bytes:
    """The bytes of a byte-level token. An added token with characters outside the alphabet, such as
    a space, is plain text."""
    try:
        return bytes([ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()
