"""One HTTP request to a route: its bounded body, and its answer, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import typing
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.routing import APIRoute, APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.api.answer import AnswerWriter
from gateway.api.http import ErrorAnswer, errors_of, read_body, typed
from gateway.api.schemas.base import Body
from gateway.api.schemas.generate import GenerateFields
from gateway.api.schemas.messages import (
    DOCUMENTS,
    REASONING_EFFORT,
    SHOWN_TOOLS,
    SWITCHED_THINKING,
    THINKING_SWITCHES,
)
from gateway.api.schemas.parsing import Ignored
from gateway.clock import Deadline, Stopwatch
from gateway.edge.admission import Ticket
from gateway.edge.limits import ERROR_DELIVERY_S
from gateway.job import AnyPrompt, GenerationOptions, Job
from gateway.job_group import JobGroup
from gateway.prompt.placeholders import ExpandedPrompt
from opticnerve.errors import OpticNerveError
from opticnerve.telemetry import logs
from opticnerve.telemetry.logs import printable

if TYPE_CHECKING:
    from gateway.api.models import ServedNames
    from gateway.app import Gateway

WARNINGS = "x-opticnerve-warnings"
MAX_WARNING = 500
PIECE_BYTES = 2**16  # Bytes of an answer that are written to the connection at a time.
UNREAD = "disconnected: the client did not read its answer by the deadline"
EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # Tells reverse proxies not to buffer events.
}
BY_TEMPLATE: dict[str, AbstractSet[str]] = {
    REASONING_EFFORT: {REASONING_EFFORT},
    "output_config.effort": {REASONING_EFFORT},
    "reasoning.effort": {REASONING_EFFORT},
    DOCUMENTS: {DOCUMENTS},
    SWITCHED_THINKING: THINKING_SWITCHES,
    SHOWN_TOOLS: {"tools"},
}
"""Fields that have an effect only if the chat template reads one of these variables."""
B = TypeVar("B", bound=Body)
W = TypeVar("W", bound=AnswerWriter)


class PiecewiseResponse(StreamingResponse):
    """An answer that is sent piece by piece. However it ends, ``source`` is closed.

    The connection of a client that does not read is closed ERROR_DELIVERY_S after the deadline, so
    that its request does not count against the limits for ever.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        source: AsyncGenerator[Any, None],
        headers: Mapping[str, str],
        deadline: Deadline,
        failure: Callable[[OpticNerveError], bytes],
    ) -> None:
        """``failure``: the end of a stream that fails."""
        super().__init__(pieces, headers=headers)
        self._pieces = pieces
        self._source = source
        self._deadline = deadline
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["failure"] = self._failure
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self._source), contextlib.aclosing(self._pieces):
            try:
                async with asyncio.timeout(self._deadline.remaining() + ERROR_DELIVERY_S):
                    await send(start)
                    await self._send_all(send)
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:
                logs.note(ended=UNREAD)

    async def _send_all(self, send: Send) -> None:
        """Sends the pieces. An error is sent as an event, after which the stream ends."""
        try:
            async for data in self._pieces:
                for start in range(0, len(data), PIECE_BYTES):
                    piece = data[start : start + PIECE_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            data = self._failure(typed(error))
            await send({"type": "http.response.body", "body": data, "more_body": True})


async def _alone(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


class Call(Request):
    """One request: its body, its limits (``ticket``, ``deadline``) and its answer."""

    ignored = Ignored()  # The body's ignored fields, set when it is read.

    @property
    def gateway(self) -> Gateway:
        gateway: Gateway = self.app.state.gateway
        return gateway

    @property
    def names(self) -> ServedNames:
        """The names that the caller may use."""
        return self.gateway.names.permitted(self.state.caller)

    @property
    def ticket(self) -> Ticket:
        """Exists on routes that take a body."""
        ticket: Ticket = self.state.ticket
        return ticket

    @property
    def deadline(self) -> Deadline:
        """Exists on routes that take a body."""
        deadline: Deadline = self.state.deadline
        return deadline

    async def read(self, model: type[B]) -> B:
        """The body as ``model``. Raises the errors of ``read_body``, DeadlineExceeded, and
        ModelNotFound for a model that is not served."""
        config = self.gateway.config
        reading = Stopwatch()
        with reading.stage("read"):
            async with self.deadline.timeout():
                parsed, self.ignored = await read_body(self, model, config, self.ticket)
        self.state.read_ms = reading.stages["read"]
        name: str | None = getattr(parsed, "model", None)
        logs.note(model=name)
        self.names.check(name)
        return parsed

    def job(self, prompt: AnyPrompt, options: GenerationOptions) -> Job:
        return self.jobs([prompt], options)[0]

    def jobs(self, prompts: Sequence[AnyPrompt], options: GenerationOptions) -> list[Job]:
        """A job for each prompt. Each frees an equal part of the body's bytes."""
        part = self.ticket.bytes // len(prompts)
        return [self._job(prompt, options, part) for prompt in prompts]

    def _job(self, prompt: AnyPrompt, options: GenerationOptions, body_bytes: int) -> Job:
        state, watch = self.state, Stopwatch()
        watch.add("read", state.read_ms)
        return Job(
            prompt=prompt,
            options=options,
            request_id=state.request_id,
            caller=state.caller,
            deadline=self.deadline,
            ticket=self.ticket,
            body_bytes=body_bytes,
            watch=watch,
        )

    def writer(self, kind: type[W], body: GenerateFields) -> W:
        """The answer's writer, with usage and timings if the body or a header asks for them."""
        timings = body.timings or self.wants_timings
        return kind(body.model, usage=body.stream_usage, timings=timings)

    @property
    def wants_timings(self) -> bool:
        """Whether a header asks for timings in the answer."""
        return self.headers.get("x-opticnerve-timings", "") in ("1", "true")

    async def render(self, prompt: AnyPrompt) -> ExpandedPrompt:
        """The prompt's token ids and spans, without a generation. Its pictures are planned. Raises
        the errors of ``Pipeline.read_pictures`` and ``Pipeline.render``."""
        pipeline, watch = self.gateway.pipeline, Stopwatch()
        hold = self.ticket.hold_bytes
        pictures = await pipeline.read_pictures(prompt, hold, self.deadline, watch)
        return await pipeline.render(prompt, pictures.plans, watch)

    async def answer(self, job: Job, writer: AnswerWriter, *, stream: bool) -> Response:
        """The answer, whole or streamed. An error before its first event is an HTTP status."""
        return await self.answer_all([job], writer, stream=stream)

    async def answer_all(
        self, jobs: Sequence[Job], writer: AnswerWriter, *, stream: bool
    ) -> Response:
        """As ``answer``, with the choices of all jobs, which have equal options."""
        run = self.gateway.pipeline.run
        made = run(jobs[0]) if len(jobs) == 1 else JobGroup(run, jobs).events()
        first = await anext(made)
        job = next((job for job in jobs if job.system_fingerprint), jobs[0])
        headers = self.warnings(job.not_enforced)
        writer.begin(job)
        if stream:
            chunks = writer.chunks(first, made)
            headers = {**EVENT_STREAM, **headers}
            return PiecewiseResponse(chunks, made, headers, job.deadline, writer.failure)
        async with contextlib.aclosing(made):
            most = self.gateway.config.max_answer_bytes
            body = await writer.body(first, made, job.ticket.hold_bytes, most)
        headers |= {"content-type": "application/json", "content-length": str(len(body))}
        return PiecewiseResponse(_alone(body), made, headers, job.deadline, writer.failure)

    def warnings(self, not_enforced: Sequence[str] = ()) -> dict[str, str]:
        """The header that lists fields without effect, and parts of schemas that are not enforced.
        Their names come from the client, so only printable characters go into the header, up to
        MAX_WARNING."""
        variables = self.gateway.pipeline.renderer.template.variables
        effective = {name for name, any_of in BY_TEMPLATE.items() if any_of & variables}
        without_effect = [name for name in self.ignored.without_effect if name not in effective]
        lists = (
            ("ignored unknown fields", self.ignored.unknown),
            ("without effect", without_effect),
            ("not enforced", not_enforced),
        )
        text = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists if names)
        if not text:
            return {}
        text = printable(text, MAX_WARNING).rstrip()  # A header must not end in a space.
        logs.note(ignored=text)
        return {WARNINGS: text}


class Route(APIRoute):
    """A route that reads its body within bounds: FastAPI would read a whole body before it checks
    anything. The handler takes a ``Call``, and ``body`` if the route has one."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        model = typing.get_type_hints(self.endpoint).get("body")
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            call = Call(request.scope, request.receive)
            if model is None:
                return await handler(call)
            # No variable here may refer to the body, so that the handler can free it.
            response: Response = await self.endpoint(call, await call.read(model))
            return response

        return handle

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or "POST" not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        gateway: Gateway = scope["app"].state.gateway
        state = scope["state"]
        with gateway.admission.arrive(state["holder"], state["caller"]) as state["ticket"]:
            state["deadline"] = Deadline.after(gateway.config.request_timeout_s)
            await super().handle(scope, receive, send)


def make_router(*tags: str, errors: Any = None) -> APIRouter:
    """A router. ``errors``: the error responses; None: OpenAI's. The handlers' names become
    operation ids, which generated clients use as method names."""
    return APIRouter(
        route_class=Route,
        tags=list(tags),
        responses=errors or errors_of(ErrorAnswer),
        generate_unique_id_function=lambda route: route.name,
    )
