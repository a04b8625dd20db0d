"""Writes a job's events as a response, whole or as a stream of events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from gateway.api.answer import AnswerWriter, WholeAnswer, WholeChoice
from gateway.api.responses.output import ResponseOutput, UnnumberedEvent
from gateway.api.responses.response import ItemStatus, failure_of, usage_of
from gateway.api.sse import dumps, with_encoded
from gateway.job import Job
from gateway.output.events import (
    AnswerEvent,
    ChoiceEnd,
    End,
    OutputEvent,
    PromptEvent,
    TokenIds,
    ToolCallStart,
)
from opticnerve.errors import OpticNerveError


class ResponsesWriter(AnswerWriter):
    """One response. Every event has a number. The last one repeats the whole response, so a stream
    keeps as much in memory as a whole answer."""

    def __init__(
        self, model: str, repeated: bytes, *, summary: bool, timings: bool, max_bytes: int
    ) -> None:
        """``repeated``: the fields that repeat the request's, as a JSON object. ``summary``:
        whether reasoning is shown as a summary. ``max_bytes``: the bound on a stream's output."""
        super().__init__(model, timings=timings)
        self._id = f"resp_{uuid.uuid4().hex}"
        self._repeated = repeated[1:-1]
        self._max_bytes = max_bytes
        self._output = ResponseOutput(summary=summary)
        self._number = 0  # The next event's number.

    def begin(self, job: Job) -> None:
        super().begin(job)
        self._answer = WholeAnswer(self.logprobs, job.ticket.hold_bytes, self._max_bytes)

    def whole_answer(self, choices: Sequence[WholeChoice], end: End) -> bytes:
        (choice,) = choices
        for part in choice.parts:
            for _ in self._output.show(part, part.text or None):
                pass
        for _ in self._output.end(_status(choice.end)):
            pass
        return self._response(_status(choice.end), end)

    async def chunks(
        self, first: AnswerEvent, events: AsyncGenerator[AnswerEvent, None]
    ) -> AsyncGenerator[bytes, None]:
        for name in ("created", "in_progress"):
            response = {"response": self._response("in_progress")}
            yield self._event(UnnumberedEvent(f"response.{name}", {}, response))
        last = first
        while not isinstance(last, End):
            assert not isinstance(last, PromptEvent | TokenIds)  # Never asked for here.
            if made := b"".join(map(self._event, self._take(last))):
                yield made
            last = await anext(events)
        (choice,) = self._answer.ended()
        status = _status(choice.end)
        response = {"response": self._response(status, last)}
        yield self._event(UnnumberedEvent(f"response.{status}", {}, response))

    def failure(self, error: OpticNerveError) -> bytes:
        """The error in both forms that clients look for: an error event, and a failed response."""
        told = error.to_openai()
        fields = {name: told["error"][name] for name in ("code", "message", "param")}
        failed = {"response": self._response("failed", error=error)}
        return self._event(UnnumberedEvent("error", {**fields, **told})) + self._event(
            UnnumberedEvent("response.failed", {}, failed)
        )

    def _take(self, more: OutputEvent | ChoiceEnd) -> Iterator[UnnumberedEvent]:
        choice = self._answer.add(more)
        if isinstance(more, ChoiceEnd):
            return self._output.end(_status(more))
        text = None if isinstance(more, ToolCallStart) else more.text
        return self._output.show(choice.parts[-1], text)

    def _event(self, event: UnnumberedEvent) -> bytes:
        """One event, of which no line but the first two has text."""
        fields = {"type": event.type, "sequence_number": self._number, **event.fields}
        self._number += 1
        name = b"event: " + event.type.encode()
        return name + b"\ndata: " + with_encoded(fields, event.encoded) + b"\n\n"

    def _response(
        self, status: str, end: End | None = None, error: OpticNerveError | None = None
    ) -> bytes:
        """``end``: the job's last event, if the response has ended."""
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        head: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": error and failure_of(error),
            "incomplete_details": cut,
            "model": self._model,
            "usage": end and usage_of(end),
            "system_fingerprint": self.system_fingerprint,
            **(self.timings_of(end) if end else {}),
        }
        output = b",".join(self._output.encoded)
        pieces = (dumps(head)[:-1], b",", self._repeated, b',"output":[', output, b"]}")
        return b"".join(pieces)


def _status(end: ChoiceEnd | None) -> ItemStatus:
    """The status of the response, and of its last item."""
    cut = end is not None and end.finish_reason == "length"
    return "incomplete" if cut else "completed"
