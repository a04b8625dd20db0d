"""The events that a client may send in a realtime session, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gateway.api.realtime.items import AnyInputItem, AnyNewItem, ItemId
from gateway.api.responses.items import (
    RUNS_NO_TOOLS,
    UNSUPPORTED_ITEMS,
    UNSUPPORTED_PARTS,
    check_calls,
)
from gateway.api.responses.request import Metadata
from gateway.api.responses.settings import ChosenTool, call_choice
from gateway.api.schemas.base import (
    INTEGRAL,
    Body,
    BoundedList,
    Strict,
    UnsupportedField,
    fault,
    join,
    no_larger,
    unsupported_kind,
)
from gateway.api.schemas.long_json import Outline
from gateway.api.schemas.messages import Effort
from gateway.api.schemas.parsing import decode, parse
from gateway.api.schemas.sampling import SamplingFields
from gateway.api.schemas.tools import Function, check_names
from gateway.edge.limits import MAX_ITEM_CHARACTERS, MAX_TOOLS, MAX_TOOLS_SIZE
from gateway.job import ToolUse
from opticnerve.errors import InvalidRequest, UnsupportedFeature, did_you_mean
from opticnerve.telemetry.logs import printable

TRANSCRIPT = "send a transcript as input_text"
TEXT_ONLY = 'ask for text: output_modalities ["text"]'

# Types of events, parts, items and tools that are not supported, with advice.
UNSUPPORTED_EVENTS = {
    "input_audio_buffer.append": TRANSCRIPT,
    "input_audio_buffer.clear": TRANSCRIPT,
    "input_audio_buffer.commit": TRANSCRIPT,
    "output_audio_buffer.clear": "answers are text; send response.cancel to end one",
    "conversation.item.truncate": "it cuts audio; delete the item and create a shorter one",
    "transcription_session.update": "send session.update with a session of type realtime",
}
REFUSED_PARTS = {**UNSUPPORTED_PARTS, "output_audio": "send its transcript as output_text"}
REFUSED_ITEMS = {
    kind: advice for kind, advice in UNSUPPORTED_ITEMS.items() if kind != "item_reference"
}
REFUSED_TOOLS = {"mcp": RUNS_NO_TOOLS}
MAX_AUDIO_FIELDS = 16  # Most fields of an object searched; the JSON parser bounds its depth.
MAX_SHOWN = 80  # Characters of an event's type that an error message quotes.

EventId = Annotated[str, Field(max_length=512)]


# ---- settings


class RealtimeTool(Function):
    """A function that the model may call."""

    type: Literal["function"] = "function"


RealtimeTools = Annotated[
    list[RealtimeTool], Field(max_length=MAX_TOOLS, fail_fast=True), no_larger(MAX_TOOLS_SIZE)
]


class RealtimeReasoning(Strict):
    effort: Effort | None = None


class ResponseDefaults(SamplingFields):
    """Settings of a response, or of a session for all of its responses. In addition to OpenAI's
    fields, the sampling fields of the other APIs."""

    unsupported: ClassVar[Mapping[str, UnsupportedField]] = {
        "audio": UnsupportedField(({},), TEXT_ONLY),
        "output_modalities": UnsupportedField((["text"],), 'ask for ["text"]'),
        "prompt": UnsupportedField((), "send its text as instructions"),
        "include": UnsupportedField(([],), "leave it out"),
        "tracing": UnsupportedField((), "leave it out"),
        "truncation": UnsupportedField(("disabled",), "delete items that are no longer needed"),
        "voice": UnsupportedField((), TEXT_ONLY),
        "turn_detection": UnsupportedField((), TRANSCRIPT),
    }

    instructions: Annotated[str, Field(max_length=MAX_ITEM_CHARACTERS)] | None = None
    max_output_tokens: (
        Annotated[int, Field(ge=1, le=2**31 - 1), INTEGRAL] | Literal["inf"] | None
    ) = None
    tools: RealtimeTools | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: RealtimeReasoning | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> ResponseDefaults:
        if self.n not in (None, 1):
            raise fault("n", "should be 1: a response is one answer")
        return self

    def merged(self, newer: ResponseDefaults) -> ResponseDefaults:
        """These settings, with those that ``newer`` sets in their place."""
        mine = ResponseDefaults.model_fields.keys()
        changes = {name: getattr(newer, name) for name in newer.model_fields_set & mine}
        if newer.tools == []:
            changes.setdefault("tool_choice", None)  # The choice may name a tool that was replaced.
        return self.model_copy(update=changes)

    def shown(self) -> dict[str, Any]:
        """The settings as shown in events, without unset ones."""
        given = self.model_dump(mode="json", exclude_none=True)
        for name, field in SamplingFields.model_fields.items():
            if given.get(name) == field.default:
                given.pop(name, None)
        return {
            "output_modalities": ["text"],
            "instructions": "",
            "max_output_tokens": "inf",
            "tools": [],
            "tool_choice": "auto",
            **given,
        }

    @model_validator(mode="after")
    def _different_names(self) -> ResponseDefaults:
        check_names([each.tool for each in self.tools or ()])
        return self

    def tool_use(self, path: str) -> ToolUse | None:
        """None if the model may call nothing. Raises InvalidRequest for a choice of tools that do
        not exist. That is checked here because a session's tools and choice may be set by different
        events. ``path``: the settings' path in the event."""
        tools = [each.tool for each in self.tools or ()]
        choice = call_choice(self.tool_choice)
        try:
            choice.check(tools)
        except PydanticCustomError as error:
            param = f"{path}.tool_choice"
            raise InvalidRequest(f"{param}: {error.message()}", param=param) from error
        return choice.use(tools, parallel=self.parallel_tool_calls is not False)


class SessionSettings(ResponseDefaults):
    type: Literal["realtime"] = "realtime"
    model: str | None = None


class ResponseSettings(ResponseDefaults):
    conversation: Literal["auto", "none"] = "auto"
    input: BoundedList[AnyInputItem] | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _readable_calls(self) -> ResponseSettings:
        check_calls("input", {f"input[{i}]": new for i, new in enumerate(self.input or ())})
        return self


def _no_settings() -> ResponseSettings:
    return ResponseSettings.model_validate({})


# ---- events


class ClientEvent(Body):
    type: str
    event_id: EventId | None = None


class SessionUpdate(ClientEvent):
    session: SessionSettings


class ItemCreate(ClientEvent):
    item: AnyNewItem
    previous_item_id: ItemId | None = None

    @model_validator(mode="after")
    def _readable_call(self) -> ItemCreate:
        check_calls("item", {"item": self.item})
        return self


class ItemDelete(ClientEvent):
    item_id: ItemId


class ItemRetrieve(ClientEvent):
    item_id: ItemId


class ResponseCreate(ClientEvent):
    response: ResponseSettings = Field(default_factory=_no_settings)


class ResponseCancel(ClientEvent):
    response_id: ItemId | None = None


EVENTS: dict[str, type[ClientEvent]] = {
    "session.update": SessionUpdate,
    "conversation.item.create": ItemCreate,
    "conversation.item.delete": ItemDelete,
    "conversation.item.retrieve": ItemRetrieve,
    "response.create": ResponseCreate,
    "response.cancel": ResponseCancel,
}
SETTINGS: dict[str, type[ResponseDefaults]] = {
    "session": SessionSettings,
    "response": ResponseSettings,
}


def read_event(
    text: bytearray | Outline, *, ignore_unknown: bool = False
) -> tuple[str | None, ClientEvent | InvalidRequest]:
    """(the client's id of the event, if any; the event, or the error in it). Raises InvalidRequest
    for text that is not an event at all."""
    raw = decode(text)
    given = raw.get("event_id")
    event_id = given if isinstance(given, str) and len(given) <= 512 else None
    try:
        return event_id, _event(raw, ignore_unknown)
    except InvalidRequest as error:
        return event_id, error


def _event(raw: dict[str, Any], ignore_unknown: bool) -> ClientEvent:
    kind = _kind(raw.get("type"))
    _check_items(raw)
    for name, model in SETTINGS.items():
        if isinstance(settings := raw.get(name), dict):
            raw[name] = _read_settings(model, settings, name, ignore_unknown)
    return parse(EVENTS[kind], raw, ignore_unknown=ignore_unknown)[0]


def _kind(kind: Any) -> str:
    """An event's type. Raises InvalidRequest."""
    if isinstance(kind, str) and kind in UNSUPPORTED_EVENTS:
        raise UnsupportedFeature(
            f"{kind}: this server takes text and pictures; {UNSUPPORTED_EVENTS[kind]}",
            param="type",
        )
    if isinstance(kind, str) and kind in EVENTS:
        return kind
    known = ", ".join(EVENTS)
    if not isinstance(kind, str):
        raise InvalidRequest(f"type: should be one of {known}", param="type", code="invalid_event")
    shown, near = printable(kind, MAX_SHOWN), did_you_mean(kind[:MAX_SHOWN], EVENTS)
    raise InvalidRequest(
        f"type: there is no event {shown!r}{near or f'; it should be one of {known}'}",
        param="type",
        code="invalid_event",
    )


def _read_settings(
    model: type[ResponseDefaults], settings: Mapping[str, Any], path: str, ignore_unknown: bool
) -> ResponseDefaults:
    """Reads settings like a body: unknown fields are refused, and unsupported ones named."""
    if settings.get("type") == "transcription":
        raise UnsupportedFeature(
            f"{path}.type: sessions of type transcription are not supported; {TRANSCRIPT}",
            param=f"{path}.type",
        )
    try:
        return parse(model, _without_nulls(settings), ignore_unknown=ignore_unknown)[0]
    except InvalidRequest as error:
        at = join(path, error.param) if error.param else path
        raise type(error)(f"{path}.{error.message}", param=at, code=error.code) from error


def _without_nulls(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without an ``audio`` that consists of nulls: clients send ``turn_detection:
    null``."""
    return {
        name: value for name, value in settings.items() if name != "audio" or not _is_null(value)
    }


def _is_null(value: Any) -> bool:
    if isinstance(value, dict) and len(value) <= MAX_AUDIO_FIELDS:
        return all(map(_is_null, value.values()))
    return value is None


def _check_items(raw: Mapping[str, Any]) -> None:
    """Raises UnsupportedFeature for items, parts and tools that other servers take. Malformed ones
    are left to the models."""
    if "item" in raw:
        _check_item(raw["item"], "item")
    for name in SETTINGS:
        for place, tool in enumerate(_entries(raw.get(name), "tools")):
            _refuse_kind(tool, f"{name}.tools[{place}]", REFUSED_TOOLS, "tools")
    for place, item in enumerate(_entries(raw.get("response"), "input")):
        _check_item(item, f"response.input[{place}]")


def _entries(value: Any, name: str) -> list[Any]:
    """The list that is the field ``name`` of an object, if it is one."""
    entries = value.get(name) if isinstance(value, dict) else None
    return entries if isinstance(entries, list) else []


def _check_item(item: Any, path: str) -> None:
    _refuse_kind(item, path, REFUSED_ITEMS, "items")
    for place, part in enumerate(_entries(item, "content")):
        _refuse_kind(part, f"{path}.content[{place}]", REFUSED_PARTS, "parts")


def _refuse_kind(value: Any, path: str, unsupported: Mapping[str, str], what: str) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and (instead := unsupported.get(kind)):
        raise unsupported_kind(path, what, kind, instead)
