"""``POST /v1/chat/completions`` and ``POST /v1/apply_template``."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from gateway.api import sse
from gateway.api.http import JSONResponse, read_json, typed, warning_headers
from gateway.api.schemas.apply import ApplyTemplateRequest
from gateway.api.schemas.chat import REASONING_EFFORT, ChatRequest
from gateway.api.schemas.parsing import Ignored
from gateway.edge.deadline import Deadline
from gateway.output.choices import TextDelta
from gateway.pipeline import Call, Ended, Step
from gateway.timings import Stopwatch
from opticnerve.errors import AnswerTooLarge, EngineFailure
from opticnerve.generation.values import Usage
from opticnerve.media.plan import Span
from opticnerve.telemetry import events

if TYPE_CHECKING:
    from gateway.app import Gateway

LAST_WORDS_S = 5.0  # After the deadline, for a client to take what tells it so.
UNREAD = "left: the client did not read its answer by the deadline"
PIECE_BYTES = 2**16  # Of an answer, given to the connection at once.

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # Reverse proxies pass every event on at once.
}


async def chat(gateway: Gateway, request: Request, send: Send) -> None:
    """Answers whole, or streams. Until the first token a stream can still fail with a status."""
    with gateway.admission.arrive(request.state.holder) as ticket:
        deadline = Deadline.after(gateway.config.request_timeout_s)
        async with deadline.timeout():
            parsed, ignored = await read_json(request, ChatRequest, gateway.limits, ticket)
        events.note(model=parsed.model)
        gateway.names.check(parsed.model)
        state = request.state
        call = Call(parsed, state.request_id, state.caller, deadline, ticket, ticket.bytes)
        headers = _warnings(gateway, ignored)
        reply = Reply(parsed, request.headers.get("x-opticnerve-timings", "") in ("1", "true"))
        del parsed  # The call lets go of the messages once they are a prompt.
        async with contextlib.aclosing(gateway.pipeline.chat(call)) as steps:
            first = await anext(steps)
            answer = reply.answer(call.system_fingerprint)
            if reply.stream:
                data = _events(reply, answer, first, steps)
                await _send(send, data, {**STREAM_HEADERS, **headers}, deadline)
                return
            whole = Whole(ticket.hold, gateway.config.max_answer_bytes)
            body = await whole.read(reply, answer, first, steps)
        headers |= {"content-type": "application/json", "content-length": str(len(body))}
        await _send(send, _pieces(body), headers, deadline)


class Reply:
    """What a request says about the shape of its answer."""

    def __init__(self, request: ChatRequest, timings_by_header: bool) -> None:
        self.stream = bool(request.stream)
        self.usage = request.stream_usage
        self.timings = request.timings or timings_by_header
        self.model = request.model

    def answer(self, system_fingerprint: str | None) -> sse.ChatAnswer:
        return sse.ChatAnswer(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            model=self.model,
            system_fingerprint=system_fingerprint,
            usage_in_stream=self.usage,
        )

    def extra(self, ended: Ended) -> dict[str, Any]:
        return {"timings": ended.timings} if self.timings else {}


class Whole:
    """An answer that is sent at its end, kept as the JSON that it will be.

    Log-probabilities are a kilobyte a token: as JSON they take a tenth of what they take as
    objects, and written one by one they keep no other request waiting.
    """

    def __init__(self, hold: Callable[[int], None], max_bytes: int) -> None:
        """``hold`` counts the bytes that are kept."""
        self._hold = hold
        self._max_bytes = max_bytes
        self._bytes = 0
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[bytes]] = {}
        self._ends: dict[int, TextDelta] = {}

    async def read(
        self, reply: Reply, answer: sse.ChatAnswer, first: Step, steps: AsyncGenerator[Step, None]
    ) -> bytes:
        """The answer's body. Raises AnswerTooLarge, Overloaded, and what ``steps`` raises."""
        step = first
        while isinstance(step, TextDelta):
            self._add(step)
            step = await anext(steps)
        choices = [self._choice(index) for index in sorted(self._texts)]
        return answer.completion(choices, _usage(step.usage), reply.extra(step))

    def _add(self, delta: TextDelta) -> None:
        self._texts.setdefault(delta.index, []).append(delta.text)
        self._keep(len(delta.text))
        if delta.logprobs is not None:
            pieces = self._logprobs.setdefault(delta.index, [])
            if delta.logprobs:
                pieces.append(sse.encode_logprobs(delta.logprobs))
                self._keep(len(pieces[-1]))
        if delta.finish_reason is not None:
            self._ends[delta.index] = delta

    def _keep(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        if self._bytes > self._max_bytes:
            raise AnswerTooLarge(
                f"the answer is larger than {self._max_bytes} bytes; stream it, ask for fewer "
                "choices, tokens or top_logprobs, or raise --max-answer-bytes"
            )
        self._hold(num_bytes)

    def _choice(self, index: int) -> sse.Choice:
        last = self._ends.get(index)
        if last is None or last.finish_reason is None:
            raise EngineFailure("the LLM worker ended the answer before its end")
        return sse.Choice(
            index=index,
            text="".join(self._texts[index]),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            logprobs=self._logprobs.get(index),
        )


async def _pieces(body: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


async def _send(
    send: Send,
    pieces: AsyncGenerator[bytes, None],
    headers: dict[str, str],
    deadline: Deadline,
) -> None:
    """Sends an answer piece by piece, and its end. A client that does not read is left soon after
    the deadline: it must not hold its place, and what is kept for it, for ever."""
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    try:
        async with asyncio.timeout(deadline.remaining() + LAST_WORDS_S):
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await _send_all(send, pieces)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    except TimeoutError:
        events.note(ended=UNREAD)


async def _send_all(send: Send, pieces: AsyncGenerator[bytes, None]) -> None:
    """A failure from here on is an event, after which the stream ends."""
    try:
        async for data in pieces:
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except Exception as error:
        shown = typed(error)
        await send({"type": "http.response.body", "body": sse.failure(shown), "more_body": True})


async def _events(
    reply: Reply, answer: sse.ChatAnswer, first: Step, steps: AsyncGenerator[Step, None]
) -> AsyncGenerator[bytes, None]:
    begun: set[int] = set()
    told = 0  # Output tokens of the chunks so far.
    step = first
    while isinstance(step, TextDelta):
        data = b""
        usage = None if step.usage is None else _usage(step.usage)
        if step.index not in begun:
            begun.add(step.index)
            before = usage and replace(usage, completion_tokens=told)
            data = answer.role_chunk(step.index, before)
        if step.text or step.logprobs:
            data += answer.text_chunk(step.index, step.text, step.logprobs, usage)
        if step.finish_reason is not None:
            data += answer.finish_chunk(step.index, step.finish_reason, step.stop_reason, usage)
        told = usage.completion_tokens if usage else 0
        yield data
        step = await anext(steps)
    if reply.usage or reply.timings:
        yield answer.usage_chunk(_usage(step.usage), reply.extra(step))
    yield sse.DONE


def _usage(told: Usage) -> sse.Usage:
    return sse.Usage(
        told.prompt_tokens, told.completion_tokens, told.cached_tokens, told.embedding_tokens
    )


async def apply_template(gateway: Gateway, request: Request, send: Send) -> Response:
    """The prompt, ids and spans that a chat would become; nothing is encoded or generated."""
    with gateway.admission.arrive(request.state.holder) as ticket:
        deadline = Deadline.after(gateway.config.request_timeout_s)
        async with deadline.timeout():
            parsed, ignored = await read_json(request, ApplyTemplateRequest, gateway.limits, ticket)
        events.note(model=parsed.model)
        gateway.names.check(parsed.model)
        prepared = await gateway.pipeline.prepare(parsed, ticket.hold, deadline, Stopwatch())
    prompt = prepared.prompt
    body = {
        "prompt": prompt.prompt,
        "token_ids": list(prompt.token_ids),
        "spans": [_span(span) for span in prompt.spans],
    }
    return JSONResponse(body, headers=_warnings(gateway, ignored))


def _warnings(gateway: Gateway, ignored: Ignored) -> dict[str, str]:
    heeded = {REASONING_EFFORT} & gateway.pipeline.renderer.template.variables
    return warning_headers(ignored, heeded)


def _span(span: Span) -> dict[str, Any]:
    grid = span.grid_thw
    return {
        "token_offset": span.token_offset,
        "num_tokens": span.num_tokens,
        "item": span.item,
        "row_start": span.row_start,
        "modality": span.modality.value,
        "grid_thw": [grid.t, grid.h, grid.w],
        "seconds_per_grid": span.seconds_per_grid,
        "attention": span.attention.value,
    }
