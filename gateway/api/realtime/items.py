"""Items of a realtime conversation, in the form of the Responses API: how a session reads, keeps
and shows them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from gateway.api.responses.items import (
    AnswerText,
    InputCall,
    InputCallOutput,
    InputImage,
    InputMessage,
    InputPart,
    InputText,
)
from gateway.api.responses.transcript import Transcript
from gateway.api.schemas.base import BoundedList, Strict, Unused, fault
from gateway.api.schemas.messages import ProcessorSettings, by_type
from gateway.edge.limits import MAX_ITEM_CHARACTERS, VALUE_BYTES
from gateway.media.dataurl import is_data_url

MAX_ID = 128  # Characters.
HEAD_BYTES = 4 * VALUE_BYTES  # Bytes counted for an item besides its text.

ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Words = Annotated[str, Field(max_length=MAX_ITEM_CHARACTERS)]
ItemStatus = Literal["completed", "incomplete", "in_progress"]


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"


# ---- as clients send them


PARTS_BY_ROLE = {
    "system": ("input_text",),
    "user": ("input_text", "input_image"),
    "assistant": ("output_text",),
}


class MessageItem(InputMessage):
    type: Literal["message"]
    id: ItemId | None = None
    object: Unused = None
    role: Literal["system", "user", "assistant"]
    content: Annotated[BoundedList[InputPart], Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_of_its_role(self) -> MessageItem:
        kinds = PARTS_BY_ROLE[self.role]
        if any(part.type not in kinds for part in self.content):
            named = " or ".join(kinds)
            raise fault("content", f"should have parts of type {named}, for the role {self.role}")
        if sum(map(len, texts(self))) > MAX_ITEM_CHARACTERS:
            raise fault("content", f"should have at most {MAX_ITEM_CHARACTERS} characters of text")
        return self


class CallItem(InputCall):
    id: ItemId | None = None
    object: Unused = None
    name: ItemId
    arguments: Words
    call_id: ItemId = Field(default_factory=lambda: new_id("call"))


class CallOutputItem(InputCallOutput):
    id: ItemId | None = None
    object: Unused = None
    call_id: ItemId
    output: Words


class ItemReference(Strict):
    """An item of the conversation, in the ``input`` of a response."""

    type: Literal["item_reference"]
    id: ItemId


AnyNewItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")],
    by_type("item", "message, function_call or function_call_output"),
]
AnyInputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")]
    | Annotated[ItemReference, Tag("<item_reference>")],
    by_type("item", "message, function_call, function_call_output or item_reference"),
]


# ---- as a session keeps and shows them


Given = InputMessage | InputCall | InputCallOutput


def texts(given: Given) -> Iterator[str]:
    """The texts of an item, all of which events show."""
    match given:
        case InputMessage(content=list(parts)):
            yield from (part.text for part in parts if isinstance(part, InputText | AnswerText))
        case InputCall():
            yield from (given.name, given.arguments)
        case InputCallOutput(output=str(output)):
            yield output


@dataclass(slots=True)
class Item:
    """One item of a conversation, or of a response's own input. ``size``: its approximate bytes in
    memory."""

    id: str
    given: Given
    status: ItemStatus = "completed"
    size: int = HEAD_BYTES

    @classmethod
    def of(cls, given: MessageItem | CallItem | CallOutputItem) -> Item:
        item = cls(given.id or new_id("item"), given, given.status or "completed")
        item.size += sum(map(held_bytes, texts(given)))
        for part in given.content if isinstance(given, MessageItem) else ():
            item.size += VALUE_BYTES
            if isinstance(part, InputImage):
                item.size += held_bytes(part.image_url)
        return item

    def shown(self) -> dict[str, Any]:
        """The item as shown in events, without pictures' bytes, which the client has."""
        given = self.given
        head = {"id": self.id, "object": "realtime.item", "type": given.type, "status": self.status}
        match given:
            case InputMessage():
                parts = [_shown_part(part) for part in given.content if not isinstance(part, str)]
                return {**head, "role": given.role, "content": parts}
            case InputCall():
                call = {"name": given.name, "call_id": given.call_id}
                return {**head, **call, "arguments": given.arguments}
            case InputCallOutput():
                return {**head, "call_id": given.call_id, "output": given.output}


def held_bytes(text: str) -> int:
    """An upper bound on the memory of a string, in bytes."""
    return len(text) if text.isascii() else 4 * len(text)


def _shown_part(part: InputPart) -> dict[str, Any]:
    match part:
        case InputImage():
            url = None if is_data_url(part.image_url) else part.image_url
            return {"type": part.type, "image_url": url, "detail": part.detail or "auto"}
        case InputText() | AnswerText():
            return {"type": part.type, "text": part.text}
        case _:
            raise AssertionError("no message of a session has other parts")


def transcript_of(instructions: str | None, items: Iterable[Item]) -> Transcript:
    """The items as messages of a chat. Errors name pictures by their items' ids."""
    transcript = Transcript(instructions, ProcessorSettings())
    for item in items:
        transcript.add(item.given, item.id)
    transcript.end_turn()
    return transcript
