"""From Anthropic's turns to the messages and pictures of a ``ChatPrompt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.api.anthropic.blocks import (
    AnthropicTurn,
    Base64Source,
    Block,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    text_block,
)
from gateway.api.anthropic.request import ConversationFields
from gateway.api.schemas.messages import (
    PICTURE,
    THINKING_SWITCHES,
    FunctionCall,
    ItemSource,
    Message,
    Part,
    Role,
    TextPart,
    ToolCall,
    rendering_size,
)
from gateway.edge.threads import off_loop_above
from gateway.job import ChatPrompt
from gateway.media.dataurl import is_data_url
from opticnerve.errors import InvalidRequest

OFF_LOOP_BLOCKS = 200  # Requests with more blocks are read in a thread.
ERROR = "Error: "  # Begins the result of a call that failed; templates have no form for it.


async def read_prompt(body: ConversationFields) -> ChatPrompt:
    """The prompt of a request. Raises InvalidRequest."""
    return await off_loop_above(OFF_LOOP_BLOCKS, _num_blocks(body.messages), chat_prompt, body)


def _num_blocks(turns: Sequence[AnthropicTurn]) -> int:
    """Turns and blocks, those in results included."""
    total = len(turns)
    for turn in turns:
        for block in turn.content if isinstance(turn.content, list) else ():
            inner = block.content if isinstance(block, ToolResultBlock) else ()
            total += 1 + (len(inner) if isinstance(inner, list) else 0)
    return total


def chat_prompt(body: ConversationFields) -> ChatPrompt:
    """As ``read_prompt``, in the caller's thread."""
    reader = _Reader()
    if body.system is not None:
        reader.add(AnthropicTurn.model_construct(role="system", content=body.system), "system")
    for i, turn in enumerate(body.messages):
        reader.add(turn, f"messages[{i}]")
    messages, variables, use = reader.messages(), _thinking(body), body.tool_use
    tools = use.tools if use else ()
    return ChatPrompt(
        messages=messages,
        size=rendering_size(messages, variables, tools),
        sources=tuple(reader.sources),
        add_generation_prompt=not _continues(body.messages),
        continue_final_message=_continues(body.messages),
        chat_template_kwargs=variables,
        reasoning_effort=body.output_config.effort if body.output_config else None,
        tools=tools,
    )


def _thinking(body: ConversationFields) -> dict[str, Any] | None:
    """The template's variables that switch thinking on and off."""
    if body.thinking is None:
        return None
    return dict.fromkeys(sorted(THINKING_SWITCHES), body.thinking.type != "disabled")


def _continues(turns: Sequence[AnthropicTurn]) -> bool:
    """Whether the answer continues the last turn. Raises InvalidRequest for an assistant's turn
    that has no text to continue."""
    last = turns[-1]
    if last.role != "assistant":
        return False
    end = last.blocks[-1] if last.blocks else None
    calls = any(isinstance(block, ToolUseBlock) for block in last.blocks)
    if calls or not isinstance(end, TextBlock) or not end.text:
        param = f"messages[{len(turns) - 1}].content"
        raise InvalidRequest(
            f"{param}: the answer continues the assistant's last message, which should therefore "
            "end with text and have no tool_use; or send the user's message after it",
            param=param,
        )
    return True


@dataclass
class _Draft:
    """A message while its blocks are read."""

    role: Role
    parts: list[Part] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    answers: ToolUseBlock | str | None = None  # The call whose result it is, or its id.

    def message(self) -> Message:
        content: str | list[Part] | None = self.parts
        if all(isinstance(part, TextPart) for part in self.parts) and len(self.parts) < 2:
            content = "".join(part.text for part in self.parts if isinstance(part, TextPart))
        call = self.answers
        return Message.model_construct(
            role=self.role,
            content=content if content or not self.calls else None,
            name=call.name if isinstance(call, ToolUseBlock) else None,
            tool_call_id=call.id if isinstance(call, ToolUseBlock) else call,
            tool_calls=self.calls or None,
            reasoning_content="".join(self.thoughts) or None,
        )


class _Reader:
    """Reads turns in order. ``sources``: the pictures so far, in order."""

    def __init__(self) -> None:
        self.sources: list[ItemSource] = []
        self._drafts: list[_Draft] = []
        self._calls: dict[str, ToolUseBlock] = {}

    def messages(self) -> list[Message]:
        return [draft.message() for draft in self._drafts]

    def add(self, turn: AnthropicTurn, path: str) -> None:
        if not turn.blocks:
            self._at(turn.role)
        for j, block in enumerate(turn.blocks):
            at = f"{path}.content[{j}]"
            if isinstance(block, ToolResultBlock):
                self._add_result(block, at)
            else:
                self._add_block(self._at(turn.role), block, at)

    def _at(self, role: Role) -> _Draft:
        """The last message if it is of ``role``, else a new one."""
        if not self._drafts or self._drafts[-1].role != role:
            self._drafts.append(_Draft(role))
        return self._drafts[-1]

    def _add_block(self, draft: _Draft, block: Block, path: str) -> None:
        match block:
            case TextBlock() | ImageBlock():
                draft.parts.append(self._part(block, path))
            case ToolUseBlock():
                self._calls[block.id] = block
                call = FunctionCall.model_construct(name=block.name, arguments=block.input)
                draft.calls.append(ToolCall.model_construct(id=block.id, function=call))
            case ThinkingBlock():
                draft.thoughts.append(block.thinking)

    def _add_result(self, block: ToolResultBlock, path: str) -> None:
        """Adds a result as a message of its own, as templates expect it."""
        called = self._calls.get(block.tool_use_id, block.tool_use_id)
        draft = _Draft("tool", answers=called)
        self._drafts.append(draft)
        told = block.content or ()
        if isinstance(told, str):
            told = [text_block(told)]
        draft.parts = [self._part(each, f"{path}.content[{k}]") for k, each in enumerate(told)]
        if block.is_error:
            first = draft.parts[0] if draft.parts else None
            if isinstance(first, TextPart):
                draft.parts[0] = text_block(ERROR + first.text)
            else:
                draft.parts.insert(0, text_block(ERROR))

    def _part(self, block: TextBlock | ImageBlock, path: str) -> Part:
        if isinstance(block, TextBlock):
            return block
        source = block.source
        if isinstance(source, Base64Source):
            whole = is_data_url(source.data)
            url = source.data if whole else "data:;base64," + source.data
            self.sources.append(ItemSource(url, f"{path}.source.data"))
        else:
            self.sources.append(ItemSource(source.url, f"{path}.source.url"))
        return PICTURE
