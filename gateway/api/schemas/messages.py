"""Messages, their content parts and pictures, and the other inputs of a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic.functional_validators import AfterValidator
from pydantic_core import PydanticCustomError

from gateway.api.schemas.base import (
    INTEGRAL,
    BoundedList,
    Strict,
    Unused,
    check_strings,
    fault,
)
from gateway.api.schemas.long_json import count_values, split_long_strings
from gateway.edge.limits import (
    MAX_ARGUMENT_VALUES,
)
from gateway.edge.threads import LONG_BYTES
from gateway.job import Tool
from gateway.media.dataurl import is_data_url
from opticnerve.errors import InvalidRequest
from opticnerve.media.plan import Overrides

Role = Literal["system", "developer", "user", "assistant", "tool"]
Detail = Literal["auto", "low", "high", "original"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# Fields that set a template's variable of the same name, and have no effect without it.
REASONING_EFFORT = "reasoning_effort"
DOCUMENTS = "documents"
THINKING_SWITCHES = frozenset({"enable_thinking", "thinking"})
"""Variables by which templates let a request switch thinking on and off."""
SWITCHED_THINKING = "thinking (the chat template does not let requests choose)"
SHOWN_TOOLS = "tools (the chat template does not show them to the model)"

LOW_DETAIL_PIXELS = 512 * 512  # A picture's size with OpenAI's ``detail: low``.
URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")
DIGITS = re.compile(r"[0-9]{1,10}")
LONG_ARGUMENTS = 2**18  # Characters. Longer arguments of a tool call are parsed in steps.
PIECE_COST = 200  # Work for a message or part itself, as characters of text.
CALL_COST = 8_000  # Work for a tool call: its arguments are parsed, and may be nested deeply.
SOURCE_START = 256  # So many first characters decide whether a source is a URL or base64.


def _trimmed(value: str) -> str:
    """Strips white space, as browsers do from URLs. Raises PydanticCustomError if it is empty."""
    value = value.strip()
    if not value:
        raise PydanticCustomError("blank", "should not be empty")
    return value


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and DIGITS.fullmatch(value) else value


Source = Annotated[str, AfterValidator(_trimmed)]
Area = Annotated[int, Field(ge=1, le=2**31 - 1)]
Pixels = Annotated[
    Area,
    INTEGRAL,
    BeforeValidator(
        _number, json_schema_input_type=Area | Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")]
    ),
]
"""A number. A string of digits is accepted too: clients read it from environment variables."""


class Part(Strict):
    """Fields that parts of every type may have."""

    cache_control: Unused = Field(None, description="Has no effect: every prefix is cached.")


class TextPart(Part):
    type: Literal["text"]
    text: str


class RefusalPart(Part):
    """A model's earlier refusal; it is rendered as text."""

    type: Literal["refusal"]
    refusal: str


class PictureSettings(Strict):
    """How a picture is shown to the model."""

    detail: Detail | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class ImageUrl(PictureSettings):
    url: Source
    format: Unused = Field(None, description="Has no effect: the format is read from the picture.")


class ImageUrlPart(Part, PictureSettings):
    """OpenAI's form of a picture. ``image_url`` may be the URL itself."""

    type: Literal["image_url"]
    image_url: Source | ImageUrl


class ImagePart(Part, PictureSettings):
    """Hugging Face's form of a picture: exactly one of ``image`` (URL or base64), ``url``, and
    ``base64`` (which may also be a ``data:`` URL)."""

    type: Literal["image"]
    image: Source | None = None
    url: Source | None = None
    base64: Source | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ImagePart:
        if sum(source is not None for source in (self.image, self.url, self.base64)) != 1:
            raise PydanticCustomError(
                "source", "should name its picture by exactly one of image, url, base64"
            )
        return self


def type_tag(value: Any) -> str | None:
    """The tag of the union's model that validates ``value``, by its ``type``. Tags are in brackets
    because pydantic puts them into a problem's path, where ``text`` would look like a field."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if isinstance(kind, str) else None


def by_type(what: str, types: str, tag: Callable[[Any], str | None] = type_tag) -> Discriminator:
    """Selects the model of a union that validates a value. ``what`` and ``types``: words for the
    error of a value that no model fits."""
    message = f"should have the type {types}"
    return Discriminator(tag, custom_error_type=what, custom_error_message=message)


AnyPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[ImageUrlPart, Tag("<image_url>")]
    | Annotated[ImagePart, Tag("<image>")],
    Discriminator(type_tag),
]


class FunctionCall(Strict):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Strict):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: Annotated[int, INTEGRAL] | None = None
    function: FunctionCall


class Message(Strict):
    role: Role
    content: str | BoundedList[AnyPart] | None = None
    name: str | None = None
    tool_calls: BoundedList[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    cache_control: Unused = Field(None, description="Has no effect: every prefix is cached.")

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise fault("content", "should be a string or a list of parts")
        return self

    @property
    def text(self) -> str:
        """Its text, or its parts' texts, one a line."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        return self.content or ""


PICTURE = ImagePart.model_construct(type="image")
"""A picture's place in a message whose pictures are in a separate list."""


@dataclass(frozen=True, slots=True)
class ItemSource:
    """One picture of a request, before it is fetched. ``param`` is its path in the body."""

    url: str
    param: str
    min_pixels: int | None = None
    max_pixels: int | None = None
    low_detail: bool = False

    def overrides(self, own_max_pixels: int | None) -> Overrides:
        """The processor settings that the request changes. ``detail: low`` is a hint: it lowers
        the model's own bound (None: the family's pictures have one size) where no bound was
        given, and never raises it."""
        if not self.low_detail or own_max_pixels is None or self.max_pixels is not None:
            return Overrides(self.min_pixels, self.max_pixels)
        low = max(min(own_max_pixels, LOW_DETAIL_PIXELS), self.min_pixels or 1)
        return Overrides(self.min_pixels, None if low >= own_max_pixels else low)


def item_sources(
    messages: Sequence[Message], min_pixels: int | None = None, max_pixels: int | None = None
) -> Iterator[ItemSource]:
    """Every picture in the order of messages and parts; the arguments are the request's own
    bounds, which an item's bounds override. Raises InvalidRequest for a source that is neither a
    URL nor base64, and for bounds that cross."""
    for i, message in enumerate(messages):
        if not isinstance(message.content, list):
            continue
        for j, part in enumerate(message.content):
            if isinstance(part, ImageUrlPart | ImagePart):
                yield _source(part, f"messages[{i}].content[{j}]", min_pixels, max_pixels)


def _source(
    part: ImageUrlPart | ImagePart, path: str, min_pixels: int | None, max_pixels: int | None
) -> ItemSource:
    bounds: list[ImageUrlPart | ImagePart | ImageUrl] = [part]
    if isinstance(part, ImageUrlPart):
        if isinstance(part.image_url, ImageUrl):
            bounds.insert(0, part.image_url)
            url, param = part.image_url.url, f"{path}.image_url.url"
        else:
            url, param = part.image_url, f"{path}.image_url"
    elif part.base64 is not None:
        whole = is_data_url(part.base64)
        url, param = part.base64 if whole else "data:;base64," + part.base64, f"{path}.base64"
    elif part.url is not None:
        url, param = part.url, f"{path}.url"
    else:
        url, param = as_url(part.image or "", f"{path}.image"), f"{path}.image"
    low = next((b.min_pixels for b in bounds if b.min_pixels is not None), min_pixels)
    high = next((b.max_pixels for b in bounds if b.max_pixels is not None), max_pixels)
    check_bounds(low, high, path)
    return ItemSource(url, param, low, high, any(b.detail == "low" for b in bounds))


def picture(given: str | ImageUrl, path: str) -> ItemSource:
    """A picture that is in no message. Raises InvalidRequest as ``item_sources`` does."""
    if isinstance(given, str):
        return ItemSource(as_url(given, path), path)
    low, high = given.min_pixels, given.max_pixels
    check_bounds(low, high, path)
    return ItemSource(as_url(given.url, path), path, low, high, given.detail == "low")


def check_bounds(low: int | None, high: int | None, path: str) -> None:
    """Raises InvalidRequest for bounds of the picture at ``path`` that cross."""
    if low is not None and high is not None and low > high:
        raise InvalidRequest(f"{path}: min_pixels {low} exceeds max_pixels {high}", param=path)


def as_url(image: str, param: str) -> str:
    """``image`` itself if it is a URL; a data: URL if it is bare base64. Raises InvalidRequest for
    anything else."""
    beginning = image[:SOURCE_START]
    if URL_SCHEME.match(beginning):
        return image
    if BASE64.fullmatch(beginning.strip()) and len(image) >= 16:
        return "data:;base64," + image
    raise InvalidRequest(
        f"{param}: should be a URL (data:, https:, http:, file:) or base64", param=param
    )


def call_arguments(call: ToolCall, path: str) -> Any:
    """A call's arguments as an object, which templates expect. Raises InvalidRequest."""
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        return arguments
    return read_arguments(arguments, f"{path}.function.arguments")


def read_arguments(text: str, param: str) -> dict[str, Any]:
    """The JSON object in ``text``. Raises InvalidRequest."""
    try:
        value = _arguments(text, param)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param}: should be a JSON object", param=param) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param}: should be a JSON object", param=param)
    return value


def _arguments(text: str, param: str) -> Any:
    if len(text) > LONG_ARGUMENTS:
        try:
            return split_long_strings(text.encode("utf-8", "replace"), MAX_ARGUMENT_VALUES).read()
        except InvalidRequest as error:
            raise ValueError(error.message) from error
    value = json.loads(text) if text.strip() else {}
    check_strings(value, param)
    return value


def check_arguments(param: str, arguments: Iterable[str | dict[str, Any]]) -> None:
    """Bounds the arguments of all calls together. They are JSON inside strings, which the body's
    ``count_values`` skips. ``param``: the field with the calls. Raises InvalidRequest."""
    left = MAX_ARGUMENT_VALUES
    for each in arguments:
        if isinstance(each, str):
            left -= count_values(each.encode("utf-8", "replace"), left)
        if left < 0:
            raise InvalidRequest(
                f"{param}: the arguments of all tool calls should have at most "
                f"{MAX_ARGUMENT_VALUES} values; leave out earlier calls",
                param=param,
            )


class ProcessorSettings(Strict):
    """Bounds for every picture of the request that has none of its own."""

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


def rendering_size(
    messages: Sequence[Message],
    chat_template_kwargs: Any = None,
    tools: Sequence[Tool] = (),
    documents: Sequence[Mapping[str, str]] = (),
) -> int:
    """The work of rendering, in characters of text; counting stops beyond LONG_BYTES."""
    total = len(str(chat_template_kwargs)) if chat_template_kwargs else 0
    for tool in tools:
        total += PIECE_COST + len(tool.description) + len(str(tool.parameters))
    for document in documents:
        total += PIECE_COST + sum(len(name) + len(text) for name, text in document.items())
    for message in messages:
        total += _message_size(message)
        if total > LONG_BYTES:
            break
    return total


def _message_size(message: Message) -> int:
    content, total = message.content, PIECE_COST
    for name in ("name", "tool_call_id", "refusal", "reasoning_content", "reasoning"):
        total += len(getattr(message, name) or "")
    if isinstance(content, str):
        total += len(content)
    for part in content if isinstance(content, list) else ():
        fields = vars(part)  # A picture has neither text nor refusal.
        total += PIECE_COST + len(fields.get("text") or fields.get("refusal") or "")
    for call in message.tool_calls or ():
        arguments = call.function.arguments
        total += CALL_COST + len(call.id or "") + len(call.function.name)
        total += len(arguments) if isinstance(arguments, str) else 0
    return total
