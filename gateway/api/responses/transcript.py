"""From the items of a request's ``input`` to the messages and pictures of a ``ChatPrompt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.api.responses.items import (
    AnswerText,
    InputCall,
    InputCallOutput,
    InputImage,
    InputItem,
    InputMessage,
    InputPart,
    InputReasoning,
    InputText,
)
from gateway.api.schemas.messages import (
    PICTURE,
    FunctionCall,
    ItemSource,
    Message,
    Part,
    ProcessorSettings,
    RefusalPart,
    Role,
    TextPart,
    ToolCall,
    check_bounds,
)


@dataclass(slots=True)
class _Turn:
    """An assistant's message while its items are read."""

    reasoning: list[str] = field(default_factory=list)
    content: str | list[Part] | None = None
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def has_begun_to_answer(self) -> bool:
        return self.content is not None or bool(self.calls)


class Transcript:
    """Messages as templates expect them: consecutive items of an assistant's reasoning, text and
    calls become one message."""

    def __init__(self, instructions: str | None, settings: ProcessorSettings) -> None:
        """``settings``: bounds for pictures that have none of their own."""
        self.messages: list[Message] = []
        self.sources: list[ItemSource] = []
        self._settings = settings
        self._turn = _Turn()
        self._called: dict[str, str] = {}  # The function's name, by call id.
        if instructions:
            self._message("system", instructions)

    def read(self, items: str | Sequence[InputItem]) -> None:
        """Adds all items. Raises InvalidRequest for a picture whose min_pixels exceeds its
        max_pixels."""
        if isinstance(items, str):
            self._message("user", items)
            return
        for i, item in enumerate(items):
            self.add(item, f"input[{i}]")
        self.end_turn()

    def add(self, item: InputItem, path: str) -> None:
        """``path``: the item's path, for errors."""
        match item:
            case InputReasoning():
                if self._turn.has_begun_to_answer:
                    self.end_turn()
                self._turn.reasoning += [item.text] if item.text else []
            case InputMessage(role="assistant"):
                if self._turn.has_begun_to_answer:
                    self.end_turn()
                self._turn.content = self._content(item.content, f"{path}.content")
            case InputMessage():
                self.end_turn()
                self._message(item.role, self._content(item.content, f"{path}.content"))
            case InputCall() if item.is_complete:
                self._called[item.call_id] = item.name
                function = FunctionCall(name=item.name, arguments=item.arguments)
                self._turn.calls.append(ToolCall(id=item.call_id, function=function))
            case InputCallOutput():
                self.end_turn()
                content = self._content(item.output, f"{path}.output")
                name = item.name or self._called.get(item.call_id)
                self._message("tool", content, tool_call_id=item.call_id, name=name)

    def end_turn(self) -> None:
        """Completes the assistant's message; also to be called after the last item."""
        turn, self._turn = self._turn, _Turn()
        if turn.has_begun_to_answer or turn.reasoning:
            reasoning = "\n\n".join(turn.reasoning) or None
            calls = turn.calls or None
            self._message("assistant", turn.content, reasoning_content=reasoning, tool_calls=calls)

    def _message(self, role: Role, content: str | list[Part] | None, **fields: Any) -> None:
        self.messages.append(Message.model_construct(role=role, content=content, **fields))

    def _content(self, content: str | Sequence[InputPart], path: str) -> str | list[Part]:
        if isinstance(content, str):
            return content
        return [self._part(part, f"{path}[{j}]") for j, part in enumerate(content)]

    def _part(self, part: InputPart, path: str) -> Part:
        match part:
            case InputText() | AnswerText():
                return TextPart.model_construct(type="text", text=part.text)
            case RefusalPart():
                return part
            case InputImage():
                self.sources.append(self._source(part, path))
                return PICTURE

    def _source(self, part: InputImage, path: str) -> ItemSource:
        low, high = part.min_pixels, part.max_pixels
        low = self._settings.min_pixels if low is None else low
        high = self._settings.max_pixels if high is None else high
        check_bounds(low, high, path)
        return ItemSource(part.image_url, f"{path}.image_url", low, high, part.detail == "low")
