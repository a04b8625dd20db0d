"""The items of a request's ``input``: messages, calls of functions, their outputs and reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from gateway.api.schemas.base import BoundedList, Strict, Unused, unsupported_kind
from gateway.api.schemas.messages import (
    Part,
    PictureSettings,
    RefusalPart,
    Source,
    by_type,
    check_arguments,
    read_arguments,
    type_tag,
)
from opticnerve.errors import UnsupportedFeature

UNSUPPORTED_PARTS: dict[str, str] = {
    "input_file": "send its text, or its pages as pictures",
    "input_audio": "send a transcript as text",
    "input_video": "send pictures of it",
    "text": "use input_text, or output_text in an assistant's message",
    "image_url": "use input_image",
    "image": "use input_image",
    "computer_screenshot": "use input_image",
}
RUNS_NO_TOOLS = "this server runs no tools; declare a function, and send its calls and outputs"
KEEPS_NOTHING = (
    "this server keeps no items; send the item itself, as clients do that are told to store "
    "nothing (the AI SDK: providerOptions.openai.store = false)"
)


class InputText(Part):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Unused = Field(
        None, description="Has no effect: every prefix is cached."
    )


class AnswerText(Part):
    """Text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: Unused = None
    logprobs: Unused = None


class InputImage(Part, PictureSettings):
    type: Literal["input_image"]
    image_url: Source = Field(description="An http, https, data or file URL.")
    file_id: None = Field(None, description="Refused: send image_url.")
    prompt_cache_breakpoint: Unused = Field(
        None, description="Has no effect: every prefix is cached."
    )


InputPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[AnswerText, Tag("<output_text>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    by_type("part", "input_text, input_image, output_text or refusal"),
]


class ItemFields(Strict):
    """Fields that items of every type may have; clients send answers' items as they are."""

    id: str | None = None
    status: Unused = None


class InputMessage(ItemFields):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | BoundedList[InputPart]
    phase: Unused = None


class InputCall(ItemFields):
    """A call that the model made in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="A JSON object as text.")
    status: Literal["completed", "incomplete", "in_progress"] | None = Field(
        None, description="A call that is not completed is left out: it was cut off."
    )
    namespace: Unused = None
    caller: Unused = None

    @property
    def is_complete(self) -> bool:
        return self.status in (None, "completed")


class InputCallOutput(ItemFields):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | BoundedList[InputPart]
    name: str | None = None
    namespace: Unused = None
    caller: Unused = None


class InputReasoningText(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class InputReasoning(ItemFields):
    """Reasoning of an earlier answer; the model's chat template decides whether it is shown."""

    type: Literal["reasoning"]
    summary: BoundedList[InputReasoningText] | None = None
    content: BoundedList[InputReasoningText] | None = None
    encrypted_content: Unused = Field(None, description="Has no effect.")

    @property
    def text(self) -> str:
        """The reasoning itself where it was sent, else its summary."""
        return "\n\n".join(part.text for part in self.content or self.summary or ())


def _item_tag(value: Any) -> str | None:
    """As ``type_tag``; an object with a role and no type is a message."""
    if isinstance(value, dict) and value.get("type") is None and "role" in value:
        return "<message>"
    return type_tag(value)


InputItem = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputCallOutput, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")],
    by_type("item", "message, function_call, function_call_output or reasoning", _item_tag),
]

UNSUPPORTED_ITEMS: dict[str, str] = {
    "item_reference": KEEPS_NOTHING,
    "compaction": "send the items that it stands for",
    "compaction_trigger": "leave out items that are no longer needed",
    "context_compaction": "leave out items that are no longer needed",
    "configuration_update": "send the settings as fields of the request",
    "additional_tools": "send them in tools",
    "custom_tool_call": "declare the tool as a function with one argument",
    "custom_tool_call_output": "declare the tool as a function with one argument",
    **dict.fromkeys(
        (
            "apply_patch_call", "apply_patch_call_output", "code_interpreter_call",
            "computer_call", "computer_call_output", "file_search_call",
            "image_generation_call", "local_shell_call", "local_shell_call_output",
            "mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools",
            "program", "program_output", "shell_call", "shell_call_output", "tool_search_call",
            "tool_search_output", "web_search_call",
        ),
        RUNS_NO_TOOLS,
    ),
}  # fmt: skip
"""Types of items that OpenAI's API takes and this server does not, with advice."""


def check_calls(param: str, items: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for complete calls whose arguments are not objects, or together hold
    too many values. ``items``: by path; ``param``: the field that has them."""
    calls = {
        path: item
        for path, item in items.items()
        if isinstance(item, InputCall) and item.is_complete
    }
    check_arguments(param, (call.arguments for call in calls.values()))
    for path, call in calls.items():
        read_arguments(call.arguments, f"{path}.arguments")


def check_supported(items: Any) -> None:
    """Raises UnsupportedFeature for items and parts that this server does not support. ``items``:
    the body's ``input`` before validation; malformed ones are left to it."""
    for i, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        path, kind = f"input[{i}]", item.get("type")
        if kind is None and "role" not in item and "id" in item:
            kind = "item_reference"  # References may omit their type.
        if isinstance(kind, str) and kind in UNSUPPORTED_ITEMS:
            raise unsupported_kind(path, "items", kind, UNSUPPORTED_ITEMS[kind])
        for name in ("content", "output"):
            parts = item.get(name)
            for j, part in enumerate(parts if isinstance(parts, list) else ()):
                if isinstance(part, dict):
                    _check_part(part, f"{path}.{name}[{j}]")


def _check_part(part: Mapping[str, Any], path: str) -> None:
    kind = part.get("type")
    if isinstance(kind, str) and kind in UNSUPPORTED_PARTS:
        raise unsupported_kind(path, "parts", kind, UNSUPPORTED_PARTS[kind])
    if kind == "input_image" and part.get("file_id") is not None:
        raise UnsupportedFeature(
            f"{path}.file_id: uploaded files are not supported by this server; send the picture "
            "itself as image_url, which may be a data: URL",
            param=f"{path}.file_id",
        )
