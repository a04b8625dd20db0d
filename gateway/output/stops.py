"""Stop strings in streamed text, and one choice's text from its token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gateway.output.detokenizer import Vocabulary


class StopMatcher:
    """Finds the first of several strings in text that arrives in pieces.

    Holds back only the suffix of the text with which a stop string may begin.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """(text to show, stop string found or None, text after the start of the stop string).

        Of several matches the one that ends first wins; of those, the longest.
        """
        text = self._held + text
        found = [(at + len(s), -len(s), s) for s in self.strings if (at := text.find(s)) >= 0]
        if found:
            end, _, string = min(found)
            self._held = ""
            return text[: end - len(string)], string, text[end - len(string) :]
        keep = self._suffix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None, ""

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _suffix(self, text: str) -> int:
        """The length of the longest suffix of ``text`` with which a stop string begins."""
        longest = max((len(string) for string in self.strings), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(string.startswith(tail) for string in self.strings):
                return size
        return 0


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of some tokens. ``starts``: the position of each in the choice's text, in
    characters; tokens after a stop string are left out."""

    text: str
    starts: tuple[int, ...] = ()
    stop: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.starts)


class OutputText:
    """One choice: ids in, text out. ``stopped``: the stop string that ended it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        """``shown_ids``: special tokens that are not skipped. ``min_tokens``: the first so many
        tokens are not searched for stop strings."""
        self._detokenizer = vocabulary.detokenizer(
            skip_special_tokens=skip_special_tokens, shown_ids=shown_ids
        )
        self._matcher = StopMatcher(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self.num_tokens = 0
        self.num_characters = 0  # Of all text, including what is held back.
        self.stopped: str | None = None

    def push(self, token_ids: Iterable[int]) -> Piece:
        """Adds tokens in order. Those after a stop string are neither shown nor counted."""
        shown: list[str] = []
        starts: list[int] = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            starts.append(self.num_characters)
            self.num_tokens += 1
            text = self._detokenizer.push(token_id)
            self.num_characters += len(text)
            shown.append(self._match(text))
        return Piece("".join(shown), tuple(starts), self.stopped)

    def count_hidden(self) -> None:
        """Counts a token whose text is not shown: the stop token that ended the choice."""
        self.num_tokens += 1

    def finish(self) -> Piece:
        """The text that was held back, at the end of the choice."""
        if self.stopped is not None:
            return Piece("", stop=self.stopped)
        shown = self._match(self._detokenizer.flush())
        if self.stopped is None:
            shown += self._matcher.flush()
        return Piece(shown, stop=self.stopped)

    def _match(self, text: str) -> str:
        """The part of ``text`` that can be shown now. Sets ``stopped`` at a stop string."""
        if self.num_tokens <= self._min_tokens:
            return text
        shown, stop, rest = self._matcher.push(text)
        if stop is None:
            return shown
        self.stopped = stop
        return shown + (rest[: len(stop)] if self._include_stop else "")
