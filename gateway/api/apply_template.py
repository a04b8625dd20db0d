"""``POST /v1/apply_template``: renders a chat's prompt without generating an answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from gateway.api.http import JSONResponse
from gateway.api.routing import Call, make_router
from gateway.api.schemas.template_fields import TemplateFields
from opticnerve.media.plan import Modality, Span, SpanAttention

router = make_router("generation")


class ApplyTemplateRequest(TemplateFields):
    model: str | None = None


class PromptSpan(TypedDict):
    """A run of placeholder tokens that are replaced by rows of one item's embedding."""

    token_offset: int
    num_tokens: int
    item: Annotated[int, Field(description="Index of the picture in the request.")]
    row_start: int
    modality: Modality
    grid_thw: Annotated[list[int], Field(min_length=3, max_length=3)]
    seconds_per_grid: float
    attention: SpanAttention


class RenderedPrompt(TypedDict):
    prompt: str
    token_ids: list[int]
    spans: list[PromptSpan]


@router.post(
    "/v1/apply_template",
    summary="Render a chat's prompt, token ids and spans, without generating",
    response_model=RenderedPrompt,
)
async def apply_template(call: Call, body: ApplyTemplateRequest) -> Response:
    prompt = await call.render(body.chat)
    rendered: RenderedPrompt = {
        "prompt": prompt.prompt,
        "token_ids": list(prompt.token_ids),
        "spans": [_span(span) for span in prompt.spans],
    }
    return JSONResponse(rendered, headers=call.warnings())


def _span(span: Span) -> PromptSpan:
    grid = span.grid_thw
    return {
        "token_offset": span.token_offset,
        "num_tokens": span.num_tokens,
        "item": span.item,
        "row_start": span.row_start,
        "modality": span.modality,
        "grid_thw": [grid.t, grid.h, grid.w],
        "seconds_per_grid": span.seconds_per_grid,
        "attention": span.attention,
    }
