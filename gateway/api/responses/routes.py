"""``POST /v1/responses``: answers the items of a conversation, and keeps nothing of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from starlette.responses import Response

from gateway.api.answer import TIMINGS_HEADER, streamed
from gateway.api.http import OFF_LOOP_BYTES
from gateway.api.responses.request import ResponsesRequest
from gateway.api.responses.response import ResponseEvent, ResponseObject, repeated
from gateway.api.responses.writer import ResponsesWriter
from gateway.api.routing import Call, make_router
from gateway.api.sse import dumps
from gateway.edge.threads import off_loop_above
from gateway.job import ChatPrompt
from opticnerve.errors import OpticNerveError

router = make_router("generation")


@contextlib.contextmanager
def _blaming_input() -> Iterator[None]:
    """Attributes errors about messages to ``input``, which they are made from."""
    try:
        yield
    except OpticNerveError as error:
        if error.param == ChatPrompt.field:
            error.param = "input"
        raise


@router.post(
    "/v1/responses",
    summary="Answer items of text and pictures, without keeping them",
    response_model=ResponseObject,
    responses=streamed(ResponseEvent, "its events as server-sent events"),
    openapi_extra=TIMINGS_HEADER,
)
async def create_response(call: Call, body: ResponsesRequest) -> Response:
    job = call.job(body.prompt, body.options)
    fields = repeated(body, call.gateway.pipeline.defaults.sampling)
    encoded = await off_loop_above(OFF_LOOP_BYTES, job.body_bytes, dumps, fields)
    job.ticket.hold_bytes(len(encoded))  # Held until the answer's end, unlike the body's bytes.
    writer = ResponsesWriter(
        body.model,
        encoded,
        summary=body.wants_summary,
        timings=body.timings or call.wants_timings,
        max_bytes=call.gateway.config.max_answer_bytes,
    )
    stream = bool(body.stream)
    del body, fields, encoded  # Frees the pictures in its items once the job drops its prompt.
    with _blaming_input():
        return await call.answer(job, writer, stream=stream)
