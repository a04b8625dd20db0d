"""Bodies of requests, the models that read them, and what is read."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest

from gateway.api.apply_template import ApplyTemplateRequest
from gateway.api.chat import ChatRequest
from gateway.api.completions import CompletionRequest
from gateway.api.responses.request import ResponsesRequest
from gateway.api.schemas.base import Strict
from gateway.api.schemas.parsing import Ignored, parse
from opticnerve.errors import InvalidRequest

URL = "https://example.com/a.png"
DATA = "data:image/png;base64,iVBORw0KGgo="
TEXT = {"type": "text", "text": "What?"}


def user(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def body(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "model", "messages": list(messages) or [user()], **fields}


def read(*messages: Any, **fields: Any) -> tuple[ChatRequest, Ignored]:
    return parse(ChatRequest, json.dumps(body(*messages, **fields)).encode())


def chat(*messages: Any, **fields: Any) -> ChatRequest:
    return read(*messages, **fields)[0]


def refused(raw: dict[str, Any] | str | bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(ChatRequest, raw)
    assert caught.value.http_status == 400
    return caught.value


def models(kind: Any, found: list[type[Strict]]) -> list[type[Strict]]:
    """A request model and those that its fields hold."""
    if isinstance(kind, type) and issubclass(kind, Strict):
        if kind not in found:
            found.append(kind)
            for field in kind.model_fields.values():
                models(field.annotation, found)
        return found
    for argument in typing.get_args(kind):
        models(argument, found)
    return found


MODELS = [
    *models(ResponsesRequest, models(ChatRequest, [])),
    ApplyTemplateRequest,
    CompletionRequest,
]
BASES: dict[str, dict[str, Any]] = {
    "ResponseFormat": {"type": "text"},
    "ChatRequest": body(),
    "ApplyTemplateRequest": {"messages": [user()]},
    "CompletionRequest": {"model": "model", "prompt": "Once"},
    "ResponsesRequest": {"model": "model", "input": "hi"},
    "InputText": {"type": "input_text", "text": "x"},
    "InputImage": {"type": "input_image", "image_url": URL},
    "AnswerText": {"type": "output_text", "text": "x"},
    "InputMessage": {"role": "user", "content": "x"},
    "InputCall": {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    "InputCallOutput": {"type": "function_call_output", "call_id": "c", "output": "x"},
    "InputReasoning": {"type": "reasoning"},
    "InputReasoningText": {"type": "reasoning_text", "text": "x"},
    "ChosenTool": {"type": "function", "name": "f"},
    "AllowedToolList": {
        "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]
    },
    "TextFormat": {"type": "text"},
    "JsonObjectFormat": {"type": "json_object"},
    "ResponsesTool": {"type": "function", "name": "f"},
    "JsonSchemaFormat": {"type": "json_schema", "name": "f", "schema": {}},
    "Message": {"role": "assistant"},
    "TextPart": {"type": "text", "text": "x"},
    "RefusalPart": {"type": "refusal", "refusal": "x"},
    "ImageUrlPart": {"type": "image_url", "image_url": URL},
    "ImageUrl": {"url": URL},
    "ImagePart": {"type": "image", "base64": "AAAA"},
    "ToolCall": {"function": {"name": "f"}},
    "FunctionCall": {"name": "f"},
    "FunctionTool": {"type": "function", "function": {"name": "f"}},
    "Function": {"name": "f"},
    "FunctionName": {"name": "f"},
    "NamedTool": {"type": "function", "function": {"name": "f"}},
    "AllowedToolChoice": {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    },
    "AllowedTools": {
        "mode": "auto",
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
}  # fmt: skip
