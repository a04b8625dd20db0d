"""The sections of a choice's text: reasoning, text, and tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from gateway.output.calls.form import CallForm
from gateway.output.events import (
    OutputEvent,
    Reasoning,
    Text,
    TextLogprobs,
    ToolCallArguments,
    ToolCallStart,
)
from gateway.output.reader import Reader, Section, SectionKind
from gateway.output.thinking import ThinkingReader

MOST_HELD = 32  # Most log-probabilities that wait for text.


class Sections:
    """Turns the text of one choice into events, whatever the pieces that it arrives in.

    ``ended``: the choice may have only one call, and it is complete. ``num_reasoning_tokens``:
    tokens of its reasoning, markers included. Log-probabilities go with the next event, which may
    belong to a later piece; those of hidden reasoning are dropped.
    """

    def __init__(
        self,
        choice: int,
        *,
        thinking: ThinkingReader | None = None,
        form: CallForm | None = None,
        names: frozenset[str] = frozenset(),
        several: bool = True,
        calls_only: bool = False,
        show_reasoning: bool = True,
    ) -> None:
        """``thinking``: the reader of reasoning; None: there is no reasoning. ``form``: the form of
        calls to the tools ``names``; None: calls are text. ``several``: whether there may be more
        than one call. ``calls_only``: anything else is the beginning of a call that was cut off,
        and is not shown."""
        self.ended = False
        self.num_reasoning_tokens = 0
        self._undecided = 0  # Tokens that may turn out to be reasoning.
        self._choice = choice
        self._thinking = thinking
        self._form = form
        self._calls = None if form is None else form.reader(names)
        self._several = several
        self._calls_only = calls_only
        self._show_reasoning = show_reasoning
        self._index = -1  # Index of the last call.
        self._complete = 0  # Calls whose arguments are complete.
        self._logprobs: list[TextLogprobs] = []
        self._last: OutputEvent = Text(choice, "")

    @property
    def called(self) -> bool:
        """Whether there are calls, and all of them are complete."""
        return 0 < self._complete == self._index + 1

    def push(
        self,
        text: str,
        logprobs: Iterable[TextLogprobs] | None = None,
        starts: Sequence[int] = (),
        *,
        last: bool,
    ) -> list[OutputEvent]:
        """The events of more text. ``starts``: the position of each of its tokens in the choice's
        text, in characters. ``last``: whether this is the choice's end."""
        events = [event for section in self._read(text, last) if (event := self._event(section))]
        self._logprobs += logprobs or ()
        if self._thinking is not None:
            self._count_reasoning(self._thinking.end, starts)
            if not self._show_reasoning:
                end = self._thinking.end
                self._logprobs = [at for at in self._logprobs if at.start >= end]
        held = len(self._logprobs)
        if held and (events or last or self.ended or held >= MOST_HELD):
            events = events or [self._nothing()]
            events[0] = replace(events[0], logprobs=tuple(self._logprobs))
            self._logprobs = []
        self._last = events[-1] if events else self._last
        return events

    def _count_reasoning(self, end: float, starts: Sequence[int]) -> None:
        """``end``: the position where the reasoning ends, as far as is known."""
        if not end:
            self._undecided += len(starts)
            return
        self.num_reasoning_tokens += self._undecided + sum(start < end for start in starts)
        self._undecided = 0

    def _read(self, text: str, last: bool) -> list[Section]:
        sections = [Section(SectionKind.TEXT, text)] if text else []
        for reader in (self._thinking, self._calls):
            if reader is not None and not reader.is_done:
                sections = _through(reader, sections, last)
        return sections

    def _event(self, section: Section) -> OutputEvent | None:
        """The event of a section; None for one that is not shown."""
        if self.ended:
            return None
        choice = self._choice
        match section.kind:
            case SectionKind.TEXT:
                return None if self._calls_only else Text(choice, section.text)
            case SectionKind.REASONING:
                return Reasoning(choice, section.text) if self._show_reasoning else None
            case SectionKind.CALL:
                self._index += 1
                assert self._form is not None
                return ToolCallStart(choice, self._index, self._form.call_id(), section.text)
            case SectionKind.ARGUMENTS:
                return ToolCallArguments(choice, self._index, section.text)
            case SectionKind.CALL_END:
                self._complete += 1
                self.ended = not self._several
        return None

    def _nothing(self) -> OutputEvent:
        """An event like the last one, without text, to carry log-probabilities."""
        if isinstance(self._last, ToolCallStart | ToolCallArguments):
            return ToolCallArguments(self._choice, self._index, "")
        return replace(self._last, text="", logprobs=None)


def _through(reader: Reader, sections: Sequence[Section], last: bool) -> list[Section]:
    """``sections`` with their texts split further by ``reader``."""
    made: list[Section] = []
    for section in sections:
        made += reader.push(section.text) if section.kind is SectionKind.TEXT else [section]
    return made + reader.finish() if last else made
