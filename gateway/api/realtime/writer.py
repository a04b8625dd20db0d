"""Turns the pipeline's events into a realtime session's, for one response. Knows no connection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from gateway.api.realtime.conversation import Conversation
from gateway.api.realtime.items import Given, Item, ItemStatus, new_id
from gateway.api.responses.items import AnswerText, InputCall, InputMessage
from gateway.output.events import (
    AnswerEvent,
    ChoiceEnd,
    End,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from opticnerve.errors import OpticNerveError
from opticnerve.generation.values import Usage

ServerEvent = dict[str, Any]
ResponseStatus = Literal["in_progress", "completed", "cancelled", "failed", "incomplete"]


class ResponseWriter:
    """Makes the events of one response, from ``begin`` to ``end``. Adds its items to
    ``conversation``, if there is one. The model's reasoning is not shown."""

    def __init__(
        self,
        conversation: Conversation | None,
        max_output_tokens: int | str,
        metadata: Mapping[str, str] | None,
    ) -> None:
        self.id = new_id("resp")
        self._conversation = conversation
        self._max_output_tokens = max_output_tokens
        self._metadata = metadata
        self._output: list[Item] = []
        self._open: Item | None = None  # The last item, while it is being written.
        self._pieces: list[str] = []  # Its text.
        self._previous: str | None = None  # The item before it in the conversation.
        self._usage: Usage | None = None
        self._length = False  # Whether the answer ended at max_output_tokens.

    @property
    def in_conversation(self) -> bool:
        return self._conversation is not None

    def begin(self) -> Iterator[ServerEvent]:
        yield {"type": "response.created", "response": self._shown("in_progress")}

    def take(self, event: AnswerEvent) -> Iterator[ServerEvent]:
        """The events for one of the pipeline's; for End, all remaining ones. Raises PayloadTooLarge
        and Overloaded if the conversation cannot hold more."""
        self._usage = event.usage or self._usage
        match event:
            case Text(text=text):
                if text:
                    yield from self._text(text)
            case ToolCallStart():
                yield from self._close_item("completed")
                yield from self._open_item(_call(event.name, event.call_id, "", "in_progress"))
            case ToolCallArguments(text=text):
                yield from self._delta("response.function_call_arguments.delta", text)
            case ChoiceEnd():
                self._length = event.finish_reason == "length"
                if not self._output:  # An answer has at least one item, which may be empty.
                    yield from self._open_item(_message())
            case End():
                yield from self.end("incomplete" if self._length else "completed")

    def end(
        self, status: ResponseStatus, error: OpticNerveError | None = None
    ) -> Iterator[ServerEvent]:
        """The events that end the response, whatever was written before."""
        yield from self._close_item("completed" if status == "completed" else "incomplete")
        yield {"type": "response.done", "response": self._shown(status, error)}

    # ---- items

    def _text(self, text: str) -> Iterator[ServerEvent]:
        if self._open is None or not isinstance(self._open.given, InputMessage):
            yield from self._close_item("completed")
            yield from self._open_item(_message())
        yield from self._delta("response.output_text.delta", text)

    def _open_item(self, given: Given) -> Iterator[ServerEvent]:
        item = Item(new_id("item"), given, "in_progress")
        if self._conversation is not None:
            self._previous = self._conversation.add(item)
        self._open, self._pieces = item, []
        self._output.append(item)
        yield self._about("response.output_item.added", item=item.shown())
        if self._conversation is not None:
            yield self._in_conversation("conversation.item.added", item)
        if isinstance(given, InputMessage):
            part = {"type": "text", "text": ""}
            yield self._about("response.content_part.added", **self._place(), part=part)

    def _delta(self, kind: str, text: str) -> Iterator[ServerEvent]:
        assert self._open is not None
        if self._conversation is not None:
            self._conversation.grow(self._open, text)
        self._pieces.append(text)
        yield self._about(kind, **self._place(), delta=text)

    def _close_item(self, status: Literal["completed", "incomplete"]) -> Iterator[ServerEvent]:
        if self._open is None:
            return
        item, text, place = self._open, "".join(self._pieces), self._place()
        self._open, self._pieces = None, []
        item.status = status
        if isinstance(item.given, InputCall):
            name = item.given.name
            item.given = _call(name, item.given.call_id, text, status)
            yield self._about(
                "response.function_call_arguments.done", **place, name=name, arguments=text
            )
        else:
            item.given = _message(text)
            part = {"type": "text", "text": text}
            yield self._about("response.output_text.done", **place, text=text)
            yield self._about("response.content_part.done", **place, part=part)
        if self._conversation is not None:
            yield self._in_conversation("conversation.item.done", item)
        yield self._about("response.output_item.done", item=item.shown())

    # ---- shapes

    def _about(self, kind: str, **fields: Any) -> ServerEvent:
        index = len(self._output) - 1
        return {"type": kind, "response_id": self.id, "output_index": index, **fields}

    def _place(self) -> dict[str, Any]:
        """The fields that locate the open item's text."""
        assert self._open is not None
        given = self._open.given
        if isinstance(given, InputCall):
            return {"item_id": self._open.id, "call_id": given.call_id}
        return {"item_id": self._open.id, "content_index": 0}

    def _in_conversation(self, kind: str, item: Item) -> ServerEvent:
        return {"type": kind, "previous_item_id": self._previous, "item": item.shown()}

    def _shown(
        self, status: ResponseStatus, error: OpticNerveError | None = None
    ) -> dict[str, Any]:
        conversation = self._conversation
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": _details(status, error),
            "output": [item.shown() for item in self._output],
            "conversation_id": None if conversation is None else conversation.id,
            "output_modalities": ["text"],
            "max_output_tokens": self._max_output_tokens,
            "usage": None if self._usage is None else _usage(self._usage),
            "metadata": self._metadata,
        }


def _message(*texts: str) -> InputMessage:
    parts = [AnswerText.model_construct(type="output_text", text=text) for text in texts]
    return InputMessage.model_construct(role="assistant", content=parts)


def _call(name: str, call_id: str, arguments: str, status: ItemStatus) -> InputCall:
    return InputCall.model_construct(
        type="function_call", name=name, call_id=call_id, arguments=arguments, status=status
    )


REASONS = {"cancelled": "client_cancelled", "incomplete": "max_output_tokens"}


def _details(status: ResponseStatus, error: OpticNerveError | None) -> dict[str, Any] | None:
    if status in ("in_progress", "completed"):
        return None
    details: dict[str, Any] = {"type": status, "reason": REASONS.get(status)}
    if error is not None:
        body = error.to_openai()["error"]
        details["error"] = {name: body[name] for name in ("type", "code", "message", "param")}
    return details


def _usage(usage: Usage) -> dict[str, Any]:
    text = usage.prompt_tokens - usage.embedding_tokens
    return {
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "input_token_details": {
            "text_tokens": text,
            "image_tokens": usage.embedding_tokens,
            "audio_tokens": 0,
            "cached_tokens": usage.cached_tokens,
        },
        "output_token_details": {"text_tokens": usage.completion_tokens, "audio_tokens": 0},
    }


def with_ids(events: Iterable[ServerEvent]) -> Iterator[ServerEvent]:
    """The events, each with an id of its own."""
    for event in events:
        yield {"event_id": new_id("event"), **event}
