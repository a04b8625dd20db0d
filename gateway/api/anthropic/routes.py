"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``: Anthropic's Messages API."""

from __future__ import annotations

from dataclasses import replace

from starlette.responses import Response
from typing_extensions import TypedDict

from gateway.api.answer import TIMINGS_HEADER, streamed
from gateway.api.anthropic.errors import PATH, AnthropicError
from gateway.api.anthropic.prompt import read_prompt
from gateway.api.anthropic.request import CountTokensRequest, MessagesRequest
from gateway.api.anthropic.writer import AnthropicMessage, AnthropicWriter, MessageEvent
from gateway.api.http import JSONResponse, errors_of
from gateway.api.routing import Call, make_router

BETA = "anthropic-beta"

router = make_router("generation", errors=errors_of(AnthropicError))


class TokenCount(TypedDict):
    input_tokens: int


@router.post(
    PATH,
    summary="Answer a conversation about text and pictures, in Anthropic's format",
    response_model=AnthropicMessage,
    responses=streamed(MessageEvent, "its events, each named by its `type`"),
    openapi_extra=TIMINGS_HEADER,
)
async def create_message(call: Call, body: MessagesRequest) -> Response:
    _warn_of_betas(call)
    writer = AnthropicWriter(body.model, body.max_tokens, timings=call.wants_timings)
    job = call.job(await read_prompt(body), body.options)
    stream = body.stream
    del body  # Frees the pictures in its messages once the job drops its prompt.
    return await call.answer(job, writer, stream=stream)


@router.post(
    f"{PATH}/count_tokens",
    summary="Count the tokens of a conversation, without answering it",
    response_model=TokenCount,
)
async def count_message_tokens(call: Call, body: CountTokensRequest) -> Response:
    _warn_of_betas(call)
    rendered = await call.render(await read_prompt(body))
    counted: TokenCount = {"input_tokens": len(rendered.token_ids)}
    return JSONResponse(counted, headers=call.warnings())


def _warn_of_betas(call: Call) -> None:
    """Warns that the header that enables beta features has no effect: nothing served here needs
    it."""
    if BETA in call.headers:
        without_effect = (*call.ignored.without_effect, f"the header {BETA}")
        call.ignored = replace(call.ignored, without_effect=without_effect)
