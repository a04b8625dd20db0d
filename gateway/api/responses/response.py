"""The shapes of a response and of a stream's events; and the request's fields that a response
repeats."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from gateway.api.answer import ContentLogprob
from gateway.api.responses.request import ResponsesRequest
from gateway.api.responses.settings import JsonSchemaFormat, ResponsesTool
from gateway.output.events import End
from opticnerve.errors import OpticNerveError
from opticnerve.generation.values import Sampling

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ResponseText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(description="Always empty.")]
    logprobs: Annotated[
        list[ContentLogprob], Field(description="Empty unless the request includes them.")
    ]


class ResponseMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[ResponseText]


class ResponseCall(TypedDict):
    id: str
    type: Literal["function_call"]
    call_id: Annotated[str, Field(description="What the function's output refers to.")]
    name: str
    arguments: Annotated[str, Field(description="A JSON object as text.")]
    status: ItemStatus


class ResponseReasoningText(TypedDict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ResponseReasoning(TypedDict):
    id: str
    type: Literal["reasoning"]
    summary: list[ResponseReasoningText]
    content: list[ResponseReasoningText]
    status: ItemStatus


ResponseItem = ResponseMessage | ResponseCall | ResponseReasoning


class ResponseInputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: Annotated[int, Field(description="Always 0: writing costs nothing.")]
    image_tokens: int


class ResponseOutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: ResponseInputDetails
    output_tokens: int
    output_tokens_details: ResponseOutputDetails
    total_tokens: int


class ResponseFailure(TypedDict):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class RepeatedFields(TypedDict):
    """Fields of a response that repeat those of its request, with defaults filled in."""

    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class ResponseObject(RepeatedFields):
    id: str
    object: Literal["response"]
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[ResponseItem]
    usage: ResponseUsage | None
    system_fingerprint: Annotated[str | None, Field(description="Identifies the checkpoint.")]
    timings: NotRequired[
        Annotated[
            dict[str, Any],
            Field(description="Milliseconds by stage, if the request asks for timings."),
        ]
    ]


class ResponseEvent(TypedDict):
    """The data of one event of a stream, whose name is its ``type``. The last one is
    ``response.completed``, ``response.incomplete`` or ``response.failed``."""

    type: Annotated[str, Field(examples=["response.output_text.delta"])]
    sequence_number: Annotated[int, Field(description="From 0, without gaps.")]
    response: NotRequired[ResponseObject]
    output_index: NotRequired[Annotated[int, Field(description="The item's place in output.")]]
    item: NotRequired[ResponseItem]
    item_id: NotRequired[str]
    content_index: NotRequired[int]
    summary_index: NotRequired[int]
    part: NotRequired[ResponseText | ResponseReasoningText]
    delta: NotRequired[str]
    logprobs: NotRequired[list[ContentLogprob]]
    text: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]
    code: NotRequired[Annotated[str | None, Field(description="Of an error.")]]
    message: NotRequired[str]
    param: NotRequired[str | None]
    error: NotRequired[dict[str, Any]]


def repeated(body: ResponsesRequest, defaults: Sampling) -> RepeatedFields:
    """``defaults``: the model's, shown where the request sets no value."""
    reasoning, temperature, top_p = body.reasoning, body.temperature, body.top_p
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary or reasoning.generate_summary if reasoning else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": defaults.temperature if temperature is None else temperature,
        "text": _text(body),
        "tool_choice": _choice(body),
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if top_p is None else top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _text(body: ResponsesRequest) -> dict[str, Any]:
    text = body.text
    form = text.format if text else None
    shown: dict[str, Any] = {"type": form.type if form else "text"}
    if isinstance(form, JsonSchemaFormat):
        shown |= {
            "name": form.name,
            "description": form.description,
            "schema": form.json_schema,
            "strict": form.strict,
        }
    return {"format": shown, "verbosity": (text.verbosity if text else None) or "medium"}


def _choice(body: ResponsesRequest) -> str | dict[str, Any]:
    choice = body.tool_choice
    return choice or "auto" if isinstance(choice, str | None) else choice.model_dump()


def _tool(tool: ResponsesTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


def usage_of(end: End) -> ResponseUsage:
    usage = end.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": usage.embedding_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def failure_of(error: OpticNerveError) -> ResponseFailure:
    """``error`` with one of the codes that OpenAI's API defines for a response."""
    if error.http_status == 429:
        return {"code": "rate_limit_exceeded", "message": error.message}
    code: Literal["invalid_prompt", "server_error"]
    code = "invalid_prompt" if error.http_status < 500 else "server_error"
    return {"code": code, "message": error.message}
