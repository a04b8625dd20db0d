"""Anthropic's turns and the blocks of their content."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from gateway.api.schemas.base import UNSUPPORTED_KIND, BoundedList, Strict, Unused, fault
from gateway.api.schemas.messages import Part, Source, TextPart, by_type

_RUNS_NO_TOOLS = "this server runs no tools itself; leave the block out"
UNSUPPORTED_BLOCKS = {
    "document": "send its text, or its pages as pictures",
    "search_result": "send its text",
    "container_upload": "send the file's text, or pictures",
    "tool_reference": "send the tool itself in tools",
    "browser_state": "send its text, or a picture",
    "compaction": "send the messages that it stands for",
    "server_tool_use": _RUNS_NO_TOOLS,
    "mcp_tool_use": _RUNS_NO_TOOLS,
}
"""Types of blocks that Anthropic's API takes and this server does not, with advice. The results of
tools that Anthropic runs have types of their own, which all end in ``_tool_result``."""


class TextBlock(TextPart):
    citations: Unused = None


def text_block(text: str) -> TextBlock:
    return TextBlock.model_construct(type="text", text=text)


class Base64Source(Strict):
    type: Literal["base64"]
    media_type: Unused = Field(
        None, description="Has no effect: the format is read from the picture."
    )
    data: Source


class UrlSource(Strict):
    type: Literal["url"]
    url: Source


def _no_file(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "file":
        raise PydanticCustomError(
            UNSUPPORTED_KIND,
            "uploaded files are not supported; send the picture as base64, or its url",
        )
    return value


class ImageBlock(Part):
    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")],
        by_type("source", "base64 or url"),
        BeforeValidator(_no_file),
    ]


class ToolUseBlock(Part):
    """A call that the assistant made in an earlier turn."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Unused = None


class ThinkingBlock(Strict):
    """The model's thinking in an earlier turn; the template decides whether it is shown again."""

    type: Literal["thinking"]
    thinking: str
    signature: Unused = Field(None, description="Has no effect: it is not verified.")


class RedactedThinkingBlock(Strict):
    """Left out: only the server that wrote it can read it."""

    type: Literal["redacted_thinking"]
    data: Unused = None


def _supported(value: Any) -> Any:
    """Raises PydanticCustomError for a block whose type is in UNSUPPORTED_BLOCKS."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind == "tool_result":
        return value
    instead = UNSUPPORTED_BLOCKS.get(kind)
    if kind.endswith("_tool_result"):
        kind, instead = "of server tools' results", _RUNS_NO_TOOLS
    if instead is not None:
        message = "blocks of type {kind} are not supported; {instead}"
        raise PydanticCustomError(UNSUPPORTED_KIND, message, {"kind": kind, "instead": instead})
    return value


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")],
    by_type("block", "text or image"),
    BeforeValidator(_supported),
]


class ToolResultBlock(Part):
    """A tool's result. The model sees an error as a result that begins with ``Error:``."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | BoundedList[ResultBlock] | None = None
    is_error: bool = False


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")],
    by_type("block", "text, image, tool_use, tool_result, thinking or redacted_thinking"),
    BeforeValidator(_supported),
]

ROLES: dict[type[Strict], str] = {
    ImageBlock: "user",
    ToolResultBlock: "user",
    ToolUseBlock: "assistant",
    ThinkingBlock: "assistant",
    RedactedThinkingBlock: "assistant",
}
"""The only role whose turns may contain a type of block; other types may be in any turn."""


class AnthropicTurn(Strict):
    """A message. Consecutive turns of one role are joined."""

    role: Literal["user", "assistant", "system"]
    content: str | BoundedList[Block]

    @model_validator(mode="after")
    def _suits(self) -> AnthropicTurn:
        for block in self.blocks:
            role = ROLES.get(type(block), self.role)
            if role != self.role:
                raise fault(
                    "content", f"blocks of type {block.type} belong to the {role}'s messages"
                )
        return self

    @property
    def blocks(self) -> list[Block]:
        """The content as blocks; a string is one text block."""
        if isinstance(self.content, str):
            return [text_block(self.content)]
        return self.content
