"""What the gateway answers, as its API's description shows it.

Answers are written by ``gateway.api.sse`` and the routes, not by these models; tests hold the two
together. A field with a default is not in every answer.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from opticnerve.media.plan import Modality, SpanAttention

KEYED = "Not for callers without a key, where keys are asked for."
MISSING = "What a request would wait for."


class ErrorDetail(BaseModel):
    message: str = Field(description="What happened, and what to do.")
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(
        description="The path of the field at fault.",
        examples=["messages[0].content[1].image_url.url"],
    )
    code: str | None = Field(examples=["invalid_media"])


class ErrorAnswer(BaseModel):
    """Why a request failed. A stream that fails after its begin has this as an event."""

    error: ErrorDetail


class PromptDetails(BaseModel):
    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TokenLogprob]


class Logprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: str | None


FinishReason = Literal["stop", "length"]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: str | None


class CompletionChoice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    stop_reason: str | int | None = Field(
        description="The stop string or token that ended it; null for the model's own end."
    )
    logprobs: Logprobs | None


class Head(BaseModel):
    """What a whole answer and the chunks of a streamed one share."""

    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str | None = Field(description="Of the checkpoint that answered.")
    timings: dict[str, Any] | None = Field(
        default=None, description="Milliseconds by stage; where the request asked for timings."
    )


class ChatCompletion(Head):
    object: Literal["chat.completion"]
    choices: list[CompletionChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = Field(default=None, description="In a choice's first.")
    content: str


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = Field(default=None, description="In a choice's last chunk.")


class ChatCompletionChunk(Head):
    """The data of one event of a streamed answer. The last event's data is ``[DONE]``."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = Field(
        default=None,
        description="In the last chunk, where stream_options.include_usage asks; with "
        "continuous_usage_stats in every one, of all choices so far.",
    )


class PromptSpan(BaseModel):
    """A run of placeholders that rows of one item's embedding take the place of."""

    token_offset: int
    num_tokens: int
    item: int = Field(description="Index of the picture in the request.")
    row_start: int
    modality: Modality
    grid_thw: list[int] = Field(min_length=3, max_length=3)
    seconds_per_grid: float
    attention: SpanAttention


class Prompt(BaseModel):
    prompt: str
    token_ids: list[int]
    spans: list[PromptSpan]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Live(BaseModel):
    status: Literal["live"]


class Ready(BaseModel):
    status: Literal["ready"]
    pictures: bool = Field(description="Whether a picture request would be served now.")
    missing: list[str] = Field(default_factory=list, description=f"{MISSING} {KEYED}")


class NotReady(Ready):
    status: Literal["not ready"]  # type: ignore[assignment]


class Health(BaseModel):
    status: Literal["ok", "degraded", "unavailable", "draining"]
    missing: list[str] = Field(default_factory=list, description=f"{MISSING} {KEYED}")
    version: str = Field(default="", description=KEYED)
    encoders: dict[str, Any] = Field(default_factory=dict, description=KEYED)
    llms: dict[str, Any] = Field(default_factory=dict, description=KEYED)
    store: dict[str, Any] = Field(default_factory=dict, description=KEYED)
    gateway: dict[str, Any] = Field(default_factory=dict, description=KEYED)
    config: dict[str, Any] = Field(
        default_factory=dict, description=f"The settings in effect, without secrets. {KEYED}"
    )


class Version(BaseModel):
    name: str
    version: str


class Root(Version):
    models: list[str]
    health: str
    docs: str
