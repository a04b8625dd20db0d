"""The items of a response's output: their JSON, and the stream's events while they are written."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from pydantic_core import from_json

from gateway.api.answer import WholeCall, WholePart, WholeReasoning, WholeText
from gateway.api.responses.response import ItemStatus
from gateway.api.sse import dumps, with_encoded

EMPTY = b'""'
NONE = b"[]"


class UnnumberedEvent(NamedTuple):
    """One event of a stream, without its number. ``encoded``: fields that are encoded JSON."""

    type: str
    fields: Mapping[str, Any]
    encoded: Mapping[str, bytes] = {}


class ItemWriter(ABC):
    """Writes one item. Its ``part`` grows while the item is open."""

    prefix: ClassVar[str]
    part_event: ClassVar[str] = "response.content_part"  # Empty: the item has no parts.
    text_event: ClassVar[str]
    text_field: ClassVar[str] = "text"
    index_field: ClassVar[str] = "content_index"

    def __init__(self, part: WholePart, output_index: int) -> None:
        self.part = part
        self._output_index = output_index
        self._id = f"{self.prefix}_{uuid.uuid4().hex}"
        self._shown = 0  # Number of log-probabilities in the events so far.

    @abstractmethod
    def head(self, status: ItemStatus) -> Mapping[str, Any]:
        """The item's fields, without its text."""

    @abstractmethod
    def encoded(self, part: bytes, text: bytes) -> Mapping[str, bytes]:
        """The item's other fields. ``part``: its part with the text; empty if there is none yet."""

    def encoded_part(self, text: bytes, logprobs: bytes) -> bytes:
        return EMPTY

    def opening(self) -> Iterator[UnnumberedEvent]:
        item = with_encoded(self.head("in_progress"), self.encoded(b"", EMPTY))
        yield self._item_event("added", item)
        if self.part_event:
            part = self.encoded_part(EMPTY, NONE)
            yield UnnumberedEvent(f"{self.part_event}.added", self._place, {"part": part})

    def delta(self, text: str) -> UnnumberedEvent:
        entries = self.part.logprobs[self._shown :]
        self._shown += len(entries)
        fields = {**self._place, "delta": text}
        return UnnumberedEvent(f"{self.text_event}.delta", fields, self._logprobs(entries))

    def closing(self, status: ItemStatus) -> Iterator[UnnumberedEvent]:
        """The events that end the item; the last one contains the whole ``item``."""
        text, logprobs = dumps(self.part.text), self._logprobs(self.part.logprobs)
        part = self.encoded_part(text, logprobs.get("logprobs", NONE))
        done = {self.text_field: text, **logprobs}
        yield UnnumberedEvent(f"{self.text_event}.done", self._place, done)
        if self.part_event:
            yield UnnumberedEvent(f"{self.part_event}.done", self._place, {"part": part})
        item = with_encoded(self.head(status), self.encoded(part, text))
        yield self._item_event("done", item)

    @property
    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._id, "output_index": self._output_index}
        return {**place, self.index_field: 0} if self.part_event else place

    def _item_event(self, name: str, item: bytes) -> UnnumberedEvent:
        place = {"output_index": self._output_index}
        return UnnumberedEvent(f"response.output_item.{name}", place, {"item": item})

    def _logprobs(self, entries: Sequence[bytes]) -> dict[str, bytes]:
        return {}


class MessageWriter(ItemWriter):
    prefix = "msg"
    text_event = "response.output_text"

    def head(self, status: ItemStatus) -> Mapping[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "status": status}

    def encoded(self, part: bytes, text: bytes) -> Mapping[str, bytes]:
        return {"content": b"[" + part + b"]"}

    def encoded_part(self, text: bytes, logprobs: bytes) -> bytes:
        part = {"type": "output_text", "annotations": []}
        return with_encoded(part, {"text": text, "logprobs": logprobs})

    def _logprobs(self, entries: Sequence[bytes]) -> dict[str, bytes]:
        return {"logprobs": b"[" + b",".join(entries) + b"]"}


class ReasoningWriter(ItemWriter):
    """Reasoning as the item's content."""

    prefix = "rs"
    text_event = "response.reasoning_text"
    part_type: ClassVar[str] = "reasoning_text"
    holder: ClassVar[str] = "content"  # The item's field that holds the part.

    def head(self, status: ItemStatus) -> Mapping[str, Any]:
        return {"id": self._id, "type": "reasoning", "status": status}

    def encoded(self, part: bytes, text: bytes) -> Mapping[str, bytes]:
        return {"summary": NONE, "content": NONE, self.holder: b"[" + part + b"]"}

    def encoded_part(self, text: bytes, logprobs: bytes) -> bytes:
        return with_encoded({"type": self.part_type}, {"text": text})


class SummaryWriter(ReasoningWriter):
    """Reasoning as the item's summary, for clients that show only summaries."""

    part_event = "response.reasoning_summary_part"
    text_event = "response.reasoning_summary_text"
    index_field = "summary_index"
    part_type = "summary_text"
    holder = "summary"


class CallWriter(ItemWriter):
    prefix = "fc"
    part_event = ""
    text_event = "response.function_call_arguments"
    text_field = "arguments"

    def head(self, status: ItemStatus) -> Mapping[str, Any]:
        assert isinstance(self.part, WholeCall)
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self.part.call_id,
            "name": self.part.name,
        }

    def encoded(self, part: bytes, text: bytes) -> Mapping[str, bytes]:
        return {"arguments": text}

    def closing(self, status: ItemStatus) -> Iterator[UnnumberedEvent]:
        """A call whose arguments are not JSON stays incomplete, even in a complete answer."""
        return super().closing(status if _is_json(self.part.text) else "incomplete")


def _is_json(arguments: str) -> bool:
    """Whether a call's arguments, if it has any, can be read."""
    try:
        if arguments:
            from_json(arguments)
    except ValueError:
        return False
    return True


class ResponseOutput:
    """The items of one response, in order. ``encoded``: those that are complete, as JSON."""

    def __init__(self, *, summary: bool) -> None:
        """``summary``: whether reasoning is shown as a summary."""
        self.encoded: list[bytes] = []
        self._reasoning = SummaryWriter if summary else ReasoningWriter
        self._open: ItemWriter | None = None

    def show(self, part: WholePart, more: str | None) -> Iterator[UnnumberedEvent]:
        """The events for more text of ``part``, the answer's last part. ``more`` None: a call
        begins, without arguments so far. Text or reasoning is not shown while it is empty."""
        if self._open is None or self._open.part is not part:
            if not more and not isinstance(part, WholeCall):
                return
            yield from self._close("completed")
            self._open = self._writer(part)
            yield from self._open.opening()
        if more is not None:
            yield self._open.delta(more)

    def end(self, status: ItemStatus) -> Iterator[UnnumberedEvent]:
        """The events that end the answer. An answer without output becomes an empty message."""
        if self._open is None:
            self._open = MessageWriter(WholeText(), 0)
            yield from self._open.opening()
        yield from self._close(status)

    def _writer(self, part: WholePart) -> ItemWriter:
        index = len(self.encoded)
        match part:
            case WholeCall():
                return CallWriter(part, index)
            case WholeReasoning():
                return self._reasoning(part, index)
            case _:
                return MessageWriter(part, index)

    def _close(self, status: ItemStatus) -> Iterator[UnnumberedEvent]:
        if self._open is None:
            return
        part, events = self._open.part, list(self._open.closing(status))
        self.encoded.append(events[-1].encoded["item"])
        part.pieces, part.logprobs = [], []  # Frees them: the encoded item has them.
        self._open = None
        yield from events
