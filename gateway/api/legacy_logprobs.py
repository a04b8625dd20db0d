"""Log-probabilities as OpenAI's completions have them: four lists with an entry for each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

from pydantic import Field
from typing_extensions import TypedDict

from gateway.api.answer import LEAST_LOGPROB
from gateway.api.sse import dumps
from gateway.output.events import PromptToken, TextLogprobs, TokenLogprob

TokenText = Annotated[
    str, Field(description="A token that is no whole characters is `bytes:` and escapes.")
]


class LegacyLogprobs(TypedDict):
    tokens: list[TokenText]
    token_logprobs: Annotated[
        list[float | None],
        Field(description="null where nothing is predicted: the first token, and a picture's."),
    ]
    top_logprobs: Annotated[
        list[dict[TokenText, float] | None],
        Field(description="The token itself, and the most likely ones, by text."),
    ]
    text_offset: Annotated[
        list[int], Field(description="Where each token begins in `text`, in characters.")
    ]


class LegacyEntry(NamedTuple):
    token: str
    logprob: float | None
    top: dict[str, float] | None
    start: int


def of_output(at: TextLogprobs, most: int) -> LegacyEntry:
    """A token of an answer, with ``most`` of the most likely ones. ``start`` counts from the
    answer's beginning."""
    logprob, top = _scored(at.sampled, at.top[:most])
    return LegacyEntry(_spelled(at.sampled.spelled), logprob, top, at.start)


def of_prompt(token: PromptToken, most: int) -> LegacyEntry:
    """A token of a prompt, with ``most`` of the most likely ones."""
    text = _spelled(token.spelled)
    if token.own is None:
        return LegacyEntry(text, None, None, token.start)
    logprob, top = _scored(token.own, token.top[:most])
    return LegacyEntry(text, logprob, top, token.start)


def _scored(own: TokenLogprob, top: Sequence[TokenLogprob]) -> tuple[float, dict[str, float]]:
    """The token's own log-probability, and the most likely tokens by text, best first. Of tokens
    with the same text, the best counts."""
    found: dict[str, float] = {}
    for each in (*top, own):
        found.setdefault(_spelled(each.spelled), max(each.logprob, LEAST_LOGPROB))
    return max(own.logprob, LEAST_LOGPROB), found


def _spelled(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def legacy_json(entries: Sequence[LegacyEntry], before: int = 0) -> LegacyLogprobs:
    """``before``: the number of characters before the answer, to add to the entries' offsets."""
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [entry.top for entry in entries],
        "text_offset": [before + entry.start for entry in entries],
    }


@dataclass(slots=True)
class Scores:
    """Entries that are collected for a whole answer, as encoded JSON."""

    tokens: list[bytes] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    tops: list[bytes] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def add(self, entries: Iterable[LegacyEntry]) -> int:
        """Adds entries. Returns their approximate size in bytes."""
        size = 0
        for entry in entries:
            pieces = dumps(entry.token), dumps(entry.logprob), dumps(entry.top)
            for column, piece in zip((self.tokens, self.logprobs, self.tops), pieces, strict=True):
                column.append(piece)
            self.starts.append(entry.start)
            size += sum(map(len, pieces)) + 8
        return size

    def json(self, before: int, prompt: Scores) -> bytes:
        """A LegacyLogprobs, after the entries of ``prompt``, whose text has ``before``
        characters."""
        starts = [*prompt.starts, *(before + start for start in self.starts)]
        columns = (
            (b'{"tokens":[', (*prompt.tokens, *self.tokens)),
            (b'],"token_logprobs":[', (*prompt.logprobs, *self.logprobs)),
            (b'],"top_logprobs":[', (*prompt.tops, *self.tops)),
            (b'],"text_offset":[', (b"%d" % start for start in starts)),
        )
        return b"".join(name + b",".join(entries) for name, entries in columns) + b"]}"
