"""The sections of a choice's text: what the model thinks, text, and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
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


class Sections:
    """Turns the text of one choice into events, whatever the pieces that it arrives in.

    ``ended``: the only call that the choice may have is complete. Log-probabilities go with the
    next event, which may be one of a later piece.
    """

    def __init__(
        self,
        choice: int,
        *,
        thinking: Reader | None = None,
        form: CallForm | None = None,
        names: frozenset[str] = frozenset(),
        several: bool = True,
        calls_only: bool = False,
        show_reasoning: bool = True,
    ) -> None:
        """``thinking``: a reader of reasoning; None: there is none. ``form``: of calls of the tools
        ``names``; None: calls are text. ``several``: whether there may be more than one.
        ``calls_only``: what is no call is the beginning of one that was cut off, and not shown."""
        self.ended = False
        self._choice = choice
        self._thinking = thinking
        self._form = form
        self._calls = None if form is None else form.reader(names)
        self._several = several
        self._calls_only = calls_only
        self._show_reasoning = show_reasoning
        self._index = -1  # Of the last call.
        self._open = False  # It is not complete.
        self._logprobs: tuple[TextLogprobs, ...] | None = None
        self._last: OutputEvent = Text(choice, "")

    @property
    def called(self) -> bool:
        """Whether there are calls, and all of them are complete."""
        return self._index >= 0 and not self._open

    @property
    def thinks(self) -> bool:
        """Whether the text so far ends in reasoning."""
        return self._thinking is not None and self._thinking.kind is SectionKind.REASONING

    def push(
        self, text: str, logprobs: tuple[TextLogprobs, ...] | None, *, last: bool
    ) -> list[OutputEvent]:
        """The events of more text. ``last``: it is the choice's end."""
        if logprobs is not None:
            self._logprobs = (self._logprobs or ()) + logprobs
        events = [event for section in self._read(text, last) if (event := self._event(section))]
        if self._logprobs and (events or last or self.ended):
            events = events or [self._nothing()]
            events[0] = replace(events[0], logprobs=self._logprobs)
            self._logprobs = ()
        self._last = events[-1] if events else self._last
        return events

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
                self._open = True
                assert self._form is not None
                return ToolCallStart(choice, self._index, self._form.call_id(), section.text)
            case SectionKind.ARGUMENTS:
                return ToolCallArguments(choice, self._index, section.text)
            case SectionKind.CALL_END:
                self._open = False
                self.ended = not self._several
        return None

    def _nothing(self) -> OutputEvent:
        """More of the last event, without text: it only carries log-probabilities."""
        if isinstance(self._last, ToolCallStart | ToolCallArguments):
            return ToolCallArguments(self._choice, self._index, "")
        return replace(self._last, text="", logprobs=None)


def _through(reader: Reader, sections: Sequence[Section], last: bool) -> list[Section]:
    """The sections that ``reader`` makes of the texts among ``sections``."""
    made: list[Section] = []
    for section in sections:
        made += reader.push(section.text) if section.kind is SectionKind.TEXT else [section]
    return made + reader.finish() if last else made
