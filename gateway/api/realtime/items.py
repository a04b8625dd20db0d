"""Items of a realtime conversation: what a client sends, what the model is shown, and what events
show of an item."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from gateway.api.schemas.base import BoundedList, Strict, fault
from gateway.api.schemas.messages import (
    Detail,
    FunctionCall,
    ItemSource,
    Message,
    Source,
    ToolCall,
    type_tag,
)
from gateway.edge.limits import MAX_ITEM_CHARACTERS, VALUE_BYTES
from gateway.media.dataurl import is_data_url

MAX_ID = 128

ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Words = Annotated[str, Field(max_length=MAX_ITEM_CHARACTERS)]
ItemStatus = Literal["completed", "incomplete", "in_progress"]


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"


class InputTextPart(Strict):
    type: Literal["input_text"]
    text: Words


class InputImagePart(Strict):
    type: Literal["input_image"]
    image_url: Source = Field(description="A data: or https: URL.")
    detail: Detail | None = None


class OutputTextPart(Strict):
    type: Literal["output_text"]
    text: Words


AnyItemPart = Annotated[
    Annotated[InputTextPart, Tag("<input_text>")]
    | Annotated[InputImagePart, Tag("<input_image>")]
    | Annotated[OutputTextPart, Tag("<output_text>")],
    Discriminator(
        type_tag,
        custom_error_type="part_type",
        custom_error_message="should be of type input_text, input_image or output_text",
    ),
]
PARTS = {
    "system": ("input_text",),
    "user": ("input_text", "input_image"),
    "assistant": ("output_text",),
}


class ItemHead(Strict):
    """Fields of every item. ``object`` and ``status`` have no effect: clients send back items that
    they have received."""

    id: ItemId | None = None
    object: str | None = None
    status: str | None = None


class MessageItem(ItemHead):
    type: Literal["message"]
    role: Literal["system", "user", "assistant"]
    content: Annotated[BoundedList[AnyItemPart], Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_of_its_role(self) -> MessageItem:
        for part in self.content:
            if part.type not in PARTS[self.role]:
                parts = " or ".join(PARTS[self.role])
                raise fault("content", f"of a message of role {self.role} should be {parts}")
        return self


class FunctionCallItem(ItemHead):
    type: Literal["function_call"]
    name: Annotated[str, Field(min_length=1, max_length=MAX_ID)]
    arguments: Words
    call_id: ItemId | None = None


class FunctionCallOutputItem(ItemHead):
    type: Literal["function_call_output"]
    call_id: ItemId
    output: Words


class ItemReference(Strict):
    """An item of the conversation, in the ``input`` of a response."""

    type: Literal["item_reference"]
    id: ItemId


NewItem = MessageItem | FunctionCallItem | FunctionCallOutputItem
AnyNewItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")],
    Discriminator(
        type_tag,
        custom_error_type="item_type",
        custom_error_message="should be of type message, function_call or function_call_output",
    ),
]
AnyInputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ItemReference, Tag("<item_reference>")],
    Discriminator(
        type_tag,
        custom_error_type="item_type",
        custom_error_message="should be of type message, function_call, function_call_output or "
        "item_reference",
    ),
]


@dataclass(slots=True)
class Item:
    """One item of a conversation, or of a response's own input. ``content``: parts of a message.
    ``name``, ``call_id`` and ``text``: those of a function call (its arguments), or of its
    output."""

    id: str
    type: Literal["message", "function_call", "function_call_output"]
    role: Literal["system", "user", "assistant"] = "assistant"
    status: ItemStatus = "completed"
    content: tuple[InputTextPart | InputImagePart | OutputTextPart, ...] = ()
    name: str = ""
    call_id: str = ""
    text: str = ""
    size: int = 4 * VALUE_BYTES  # Bytes that it holds, about.

    @classmethod
    def of(cls, new: NewItem) -> Item:
        item = cls(new.id or new_id("item"), new.type)
        match new:
            case MessageItem():
                item.role, item.content = new.role, tuple(new.content)
            case FunctionCallItem():
                item.name, item.text = new.name, new.arguments
                item.call_id = new.call_id or new_id("call")
            case FunctionCallOutputItem():
                item.call_id, item.text = new.call_id, new.output
        item.size += sum(map(held_bytes, item.strings())) + VALUE_BYTES * len(item.content)
        return item

    def strings(self) -> Iterator[str]:
        yield from (self.id, self.name, self.call_id, self.text)
        for part in self.content:
            yield part.image_url if isinstance(part, InputImagePart) else part.text

    def shown(self) -> dict[str, Any]:
        """The item as events have it. A picture's bytes are left out: the client has them."""
        head = {"id": self.id, "object": "realtime.item", "type": self.type, "status": self.status}
        match self.type:
            case "message":
                parts = [_shown_part(part) for part in self.content]
                return {**head, "role": self.role, "content": parts}
            case "function_call":
                call = {"name": self.name, "call_id": self.call_id, "arguments": self.text}
                return {**head, **call}
            case "function_call_output":
                return {**head, "call_id": self.call_id, "output": self.text}


def held_bytes(text: str) -> int:
    """The memory of a string, at most."""
    return len(text) if text.isascii() else 4 * len(text)


def _shown_part(part: InputTextPart | InputImagePart | OutputTextPart) -> dict[str, Any]:
    if not isinstance(part, InputImagePart):
        return {"type": part.type, "text": part.text}
    url = None if is_data_url(part.image_url) else part.image_url
    return {"type": part.type, "image_url": url, "detail": part.detail or "auto"}


# ---- as a chat


def chat_of(items: Iterable[Item]) -> tuple[list[Message], list[ItemSource]]:
    """The items as messages of a chat, and the pictures in them, in order. Function calls belong to
    the assistant's message before them."""
    turns: list[dict[str, Any]] = []
    sources: list[ItemSource] = []
    for item in items:
        if item.type == "function_call":
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant"})
            turns[-1].setdefault("tool_calls", []).append(_call(item))
        elif item.type == "function_call_output":
            turns.append({"role": "tool", "content": item.text, "tool_call_id": item.call_id})
        else:
            turns.append({"role": item.role, "content": _content(item)})
            sources += _sources(item)
    return [Message.model_validate(turn) for turn in turns], sources


def _call(item: Item) -> ToolCall:
    return ToolCall(
        id=item.call_id, function=FunctionCall(name=item.name, arguments=item.text or "{}")
    )


def _content(item: Item) -> str | list[Any]:
    """A string where the item has nothing but text, since some templates take no parts."""
    if not any(isinstance(part, InputImagePart) for part in item.content):
        return "".join(part.text for part in item.content if not isinstance(part, InputImagePart))
    return [
        {"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}}
        if isinstance(part, InputImagePart)
        else {"type": "text", "text": part.text}
        for part in item.content
    ]


def _sources(item: Item) -> Iterator[ItemSource]:
    """The item's pictures, by the paths at which a client finds them."""
    for place, part in enumerate(item.content):
        if isinstance(part, InputImagePart):
            param = f"{item.id}.content[{place}].image_url"
            yield ItemSource(part.image_url, param, low_detail=part.detail == "low")
