"""One realtime session: carries out the client's events, and runs responses.

Knows no sockets: events come in as text, and go out through ``send``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.api.http import read_json, typed
from gateway.api.realtime.client_events import (
    ClientEvent,
    ItemCreate,
    ItemDelete,
    ItemRetrieve,
    ResponseCancel,
    ResponseCreate,
    ResponseDefaults,
    ResponseSettings,
    SessionSettings,
    SessionUpdate,
    read_event,
)
from gateway.api.realtime.conversation import Conversation
from gateway.api.realtime.items import Item, ItemReference, new_id, transcript_of
from gateway.api.realtime.writer import ResponseWriter, ServerEvent, with_ids
from gateway.api.schemas.messages import check_arguments, rendering_size
from gateway.api.schemas.sampling import SamplingFields
from gateway.clock import Deadline, expired
from gateway.edge.admission import Ticket
from gateway.edge.auth import Caller
from gateway.edge.limits import ERROR_DELIVERY_S, MAX_SESSION_RESPONSES
from gateway.edge.middleware import WEBSOCKET, Served, logged
from gateway.edge.threads import off_loop_above
from gateway.job import UNLIMITED, ChatPrompt, GenerationOptions, Job, ToolUse
from gateway.output.events import AnswerEvent, End
from opticnerve.errors import (
    Cancelled,
    InvalidRequest,
    OpticNerveError,
    Overloaded,
    Unavailable,
)
from opticnerve.telemetry import logs

if TYPE_CHECKING:
    from gateway.app import Gateway

PATH = "/v1/realtime"
OFF_LOOP_BYTES = 2**17  # Prompts whose items have more bytes are made in a thread.
NUMBER_CHARACTERS = 8  # A response's request id ends with its number in the session.


class ClientLeft(Exception):
    """The client has disconnected."""


class ClientCancelled(Exception):
    """The client cancelled a response."""


Send = Callable[[ServerEvent], Awaitable[None]]
"""Sends one event, once the client has read enough of those before it. Raises ClientLeft."""


@dataclass(frozen=True, slots=True)
class Client:
    """The client of a session. ``request_id``: the handshake's."""

    caller: Caller
    holder: str
    request_id: str


class RunningResponse:
    """A response in progress, until its last events are sent. ``prompt``: dropped once its job has
    it. ``input_bytes``: the bytes of its items; counted for the response too, because the
    conversation may free them earlier."""

    def __init__(
        self, writer: ResponseWriter, request_id: str, prompt: ChatPrompt, input_bytes: int
    ) -> None:
        self.writer = writer
        self.request_id = request_id
        self.prompt: ChatPrompt | None = prompt
        self.input_bytes = input_bytes
        self._cancelled = False
        self._wait: asyncio.Timeout | None = None  # Around the wait for the pipeline.

    def cancel(self) -> None:
        """Ends the generation. Sending goes on: the client gets all events up to the response's
        end."""
        if self._wait is not None and not self._cancelled:
            self._wait.reschedule(asyncio.get_running_loop().time())
        self._cancelled = True

    async def next(self, events: AsyncGenerator[AnswerEvent, None]) -> AnswerEvent:
        """The next of the pipeline's events. Raises ClientCancelled."""
        if not self._cancelled:
            self._wait = asyncio.timeout(None)
            try:
                async with self._wait:
                    return await anext(events)
            except TimeoutError:
                if not self._cancelled:
                    raise
            finally:
                self._wait = None
        raise ClientCancelled


class Session:
    """A session of one client. ``ticket`` holds the bytes of its conversation and events."""

    def __init__(
        self, gateway: Gateway, client: Client, ticket: Ticket, model: str, send: Send
    ) -> None:
        self.id = new_id("sess")
        self.conversation = Conversation(ticket, gateway.config.max_request_bytes)
        self._gateway = gateway
        self._client = client
        self._ticket = ticket
        self._settings: ResponseDefaults = SessionSettings.model_validate({"model": model})
        self._settings_bytes = 0
        self._send = send
        self._responses: dict[str, RunningResponse] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0  # Number of responses so far.
        self._stopping = False

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    async def open(self) -> None:
        await self._emit([{"type": "session.created", "session": self._shown()}])

    async def take(self, text: bytearray) -> None:
        """Carries out an event of the client. A faulty event is answered with an ``error`` event,
        and the session goes on."""
        held = 0

        def hold(num_bytes: int) -> None:
            nonlocal held
            self._ticket.hold_bytes(num_bytes)
            held += num_bytes

        event_id = None
        try:
            ignore = self._gateway.config.ignore_unknown_fields
            read = functools.partial(read_event, ignore_unknown=ignore)
            event_id, event = await read_json(text, read, self._gateway.config, hold)
            if isinstance(event, InvalidRequest):
                raise event
            await self._obey(event)
        except OpticNerveError as error:
            await self.tell(error, event_id)
        except ClientLeft:
            raise
        except Exception as error:
            await self.tell(typed(error), event_id)
        finally:
            self._ticket.free_bytes(held)

    async def tell(self, error: OpticNerveError, event_id: str | None = None) -> None:
        """Sends an error. ``event_id``: the client's id of the event at fault."""
        detail = {**error.to_openai()["error"], "event_id": event_id}
        logs.note(error=error.code or error.type)
        await self._emit([{"type": "error", "error": detail}])

    async def drain(self) -> None:
        """Begins no more responses, and returns when those under way have ended."""
        self._stopping = True
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Ends all responses without sending anything, and frees what they hold."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        logs.note(responses=self._count)

    # ---- client events

    async def _obey(self, event: ClientEvent) -> None:
        match event:
            case SessionUpdate():
                await self._update(event.session)
            case ItemCreate():
                await self._create_item(event)
            case ItemDelete(item_id=item_id):
                self.conversation.remove(item_id)
                await self._emit([{"type": "conversation.item.deleted", "item_id": item_id}])
            case ItemRetrieve(item_id=item_id):
                item = self.conversation.get(item_id, "item_retrieve_invalid_item_id")
                await self._emit([{"type": "conversation.item.retrieved", "item": item.shown()}])
            case ResponseCreate():
                await self._create_response(event.response)
            case ResponseCancel():
                self._cancel_response(event.response_id)

    async def _update(self, newer: SessionSettings) -> None:
        if newer.model is not None:
            names = self._gateway.names.permitted(self._client.caller)
            names.check(newer.model, "session.model")
        settings = self._settings.merged(newer)
        settings.tool_use("session")  # A choice that every response would refuse is refused here.
        size = len(settings.model_dump_json())
        self._ticket.hold_bytes(size)
        self._ticket.free_bytes(self._settings_bytes)
        self._settings, self._settings_bytes = settings, size
        await self._emit([{"type": "session.updated", "session": self._shown()}])

    async def _create_item(self, event: ItemCreate) -> None:
        item = Item.of(event.item)
        previous = self.conversation.add(item, event.previous_item_id)
        told = {"previous_item_id": previous, "item": item.shown()}
        kinds = ("conversation.item.added", "conversation.item.done")
        await self._emit({"type": kind, **told} for kind in kinds)

    def _cancel_response(self, response_id: str | None) -> None:
        for response in self._responses.values():
            if response_id == response.writer.id or (
                not response_id and response.writer.in_conversation
            ):
                response.cancel()
                return
        raise InvalidRequest(
            "there is no such response in progress",
            param="response_id" if response_id else None,
            code="response_cancel_not_active",
        )

    # ---- responses

    async def _create_response(self, given: ResponseSettings) -> None:
        self._check_response(given)
        settings = self._settings.merged(given)
        tools = settings.tool_use("response")
        items = tuple(self.conversation) if given.input is None else self._input(given)
        size = sum(item.size for item in items)
        prompt = await off_loop_above(OFF_LOOP_BYTES, size, _prompt, settings, tools, items)
        writer = ResponseWriter(
            self.conversation if given.conversation == "auto" else None,
            settings.max_output_tokens or "inf",
            given.metadata,
        )
        self._count += 1
        number = f"-{self._count}"
        identity = self._client.request_id[: logs.MAX_ID - NUMBER_CHARACTERS] + number
        response = RunningResponse(writer, identity, prompt, size)
        del prompt, items, given  # Frees pictures sent with the response once it is rendered.
        self._responses[writer.id] = response
        await self._emit(writer.begin())
        task = asyncio.create_task(self._respond(response, _options(settings, tools)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_response(self, given: ResponseSettings) -> None:
        if self._stopping:
            raise stopping()
        if given.conversation == "auto" and any(
            each.writer.in_conversation for each in self._responses.values()
        ):
            raise InvalidRequest(
                "the conversation has a response in progress; wait for its response.done, cancel "
                'it, or create this one with conversation "none"',
                param="response.conversation",
                code="conversation_already_has_active_response",
            )
        if len(self._responses) >= MAX_SESSION_RESPONSES:
            raise Overloaded(
                f"the session has {MAX_SESSION_RESPONSES} responses in progress; wait until one "
                "has ended"
            )

    def _input(self, given: ResponseSettings) -> tuple[Item, ...]:
        return tuple(
            self.conversation.get(new.id, "item_reference_invalid_item_id")
            if isinstance(new, ItemReference)
            else Item.of(new)
            for new in given.input or ()
        )

    async def _respond(self, response: RunningResponse, options: GenerationOptions) -> None:
        """Runs one response to its end. It is one request, with a line of its own in the log."""
        writer = response.writer
        caller = str(self._client.caller)
        with logged(Served(WEBSOCKET, PATH, PATH, caller=caller), response.request_id) as served:
            try:
                last = writer.take(await self._generate(response, options))
                served.status = 200
            except ClientLeft:
                return
            except ClientCancelled:
                served.status, last = Cancelled.http_status, writer.end("cancelled")
                logs.note(ended="cancelled by the client")
            except Exception as error:
                shown = typed(error)
                served.status, last = shown.http_status, writer.end("failed", shown)
            finally:
                del self._responses[writer.id]  # Before response.done: the client may go on then.
            with contextlib.suppress(ClientLeft):
                await self._emit(last)

    async def _generate(self, response: RunningResponse, options: GenerationOptions) -> End:
        """Sends the events of a response as they come; returns the pipeline's last event."""
        gateway, client = self._gateway, self._client
        deadline = Deadline.after(gateway.config.request_timeout_s)
        late = asyncio.timeout(deadline.remaining() + ERROR_DELIVERY_S)
        try:
            async with gateway.running.work(), late:
                with gateway.admission.arrive(client.holder, client.caller) as ticket:
                    ticket.count_request()
                    ticket.hold_bytes(response.input_bytes)
                    job = Job(
                        prompt=response.prompt,
                        options=options,
                        request_id=response.request_id,
                        caller=client.caller,
                        deadline=deadline,
                        ticket=ticket,
                        body_bytes=response.input_bytes,
                    )
                    response.prompt = None
                    async with contextlib.aclosing(gateway.pipeline.run(job)) as events:
                        while not isinstance(event := await response.next(events), End):
                            await self._emit(response.writer.take(event))
                        return event
        except TimeoutError as error:
            if late.expired():  # The client does not read.
                raise expired() from error
            raise

    # ---- server events

    async def _emit(self, events: Iterable[ServerEvent]) -> None:
        for event in with_ids(events):
            await self._send(event)

    def _shown(self) -> dict[str, Any]:
        return {"object": "realtime.session", "id": self.id, **self._settings.shown()}


def stopping() -> Unavailable:
    return Unavailable(
        "the gateway is stopping; open a new session", code="server_stopping", retry_after_s=1.0
    )


def _prompt(
    settings: ResponseDefaults, tools: ToolUse | None, items: tuple[Item, ...]
) -> ChatPrompt:
    """Raises InvalidRequest if there is nothing to answer, or the calls are too large."""
    transcript = transcript_of(settings.instructions, items)
    if not transcript.messages:
        raise InvalidRequest(
            "there is nothing to answer; create an item first, or give instructions or input",
            param="response.input",
        )
    calls = (call for message in transcript.messages for call in message.tool_calls or ())
    check_arguments("response.input", (call.function.arguments for call in calls))
    shown = tools.tools if tools else ()
    return ChatPrompt(
        messages=transcript.messages,
        size=rendering_size(transcript.messages, tools=shown),
        sources=tuple(transcript.sources),
        reasoning_effort=settings.reasoning.effort if settings.reasoning else None,
        tools=shown,
    )


def _options(settings: ResponseDefaults, tools: ToolUse | None) -> GenerationOptions:
    most = settings.max_output_tokens
    fields = {name: getattr(settings, name) for name in SamplingFields.model_fields}
    return GenerationOptions(
        sampling=SamplingFields.model_construct(**fields),
        max_tokens=UNLIMITED if most == "inf" else most,
        max_tokens_field="max_output_tokens",
        running_usage=True,  # So that a cancelled response has its usage.
        tools=tools,
    )
