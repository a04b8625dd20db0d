"""The interceptor around every call of a server, which sends typed errors and writes a log line;
and the base class of servicers, which refuses calls while the worker loads.

Exceptions are sent as status and details (``opticnerve.rpc.errors``). A message that does not parse
is an InvalidRequest; gRPC alone would answer UNKNOWN and log a traceback. A response that cannot be
sent, because the caller has disconnected, cancels the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError

from opticnerve.errors import InvalidRequest, Unavailable
from opticnerve.registry.entry import Kind
from opticnerve.rpc.errors import STATUS_BY_NUMBER, abort
from opticnerve.telemetry import logs, metrics, traces

if TYPE_CHECKING:
    from opticnerve.rpc.server import Server

log = logging.getLogger(__name__)

# Frequent calls, or parts of another request: successful ones are logged at DEBUG.
QUIET = frozenset({"Check", "List", "Watch", "Describe", "Fetch", "ServerReflectionInfo"})
CUT = "cut by its caller"
FINISHED = "finished"  # ``ended`` of a call that was complete when its caller left.

UNPARSABLE = object()  # Stands for a message that does not parse.

L = TypeVar("L")  # What a worker loads.
Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Any]

_HANDLERS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class Calls(grpc.aio.ServerInterceptor):
    """``worker``: the address under which other services know this one."""

    def __init__(self) -> None:
        self.worker = ""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        handler = await continuation(details)
        if handler is None:  # No method of that name: UNIMPLEMENTED.
            return None
        name, make = _HANDLERS[handler.request_streaming, handler.response_streaming]
        return make(
            self._surrounded(getattr(handler, name), str(details.method).rpartition("/")[2]),
            _lenient(handler.request_deserializer),
            handler.response_serializer,
        )

    def _surrounded(self, behavior: Behavior, method: str) -> Behavior:
        if inspect.isasyncgenfunction(behavior):
            behavior = partial(_write_all, behavior)

        async def call(request: Any, context: Context) -> Any:
            with self._traced(method, context), self._line(method, context):
                try:
                    return await behavior(_parsed(request), context)
                except (grpc.aio.AbortError, NotImplementedError):
                    raise  # The call's status is set; the latter is generated code's UNIMPLEMENTED.
                except grpc.aio.InternalError as error:  # The answer could not be sent.
                    raise asyncio.CancelledError from error
                except Exception as error:
                    return await abort(context, error)

        return call

    def _traced(self, method: str, context: Context) -> AbstractContextManager[object]:
        """The call's span, part of its caller's trace. QUIET calls have a span only within a
        caller's trace."""
        carried = context.invocation_metadata() or ()
        return traces.serving(method, carried, alone=method not in QUIET)

    @contextlib.contextmanager
    def _line(self, method: str, context: Context) -> Iterator[None]:
        event = logs.begin_event()
        left = False
        try:
            yield
        except asyncio.CancelledError:
            left = event.fields.setdefault("ended", CUT) == CUT
            raise
        finally:
            error = event.error
            traces.current().set(request_id=logs.request_id.get())
            status = "OK" if error is None else STATUS_BY_NUMBER[error.grpc_status].name
            quiet = method in QUIET and not isinstance(error, InvalidRequest)
            # Gateways call Describe every second, also while a worker loads.
            expected = method == "Describe" and isinstance(error, Unavailable)
            if error is not None and not expected:
                metrics.count_error(method, error)
                traces.current().fail(error)
            event.write(
                log,
                logging.DEBUG if quiet else logging.INFO,
                "call",
                expected=expected,
                method=method,
                status="CANCELLED" if left else status,
                worker=self.worker,
                caller=context.peer(),
            )


async def _write_all(behavior: Behavior, request: Any, context: Context) -> None:
    """Writes the messages of a generator method to its call."""
    async with contextlib.aclosing(behavior(request, context)) as messages:
        async for message in messages:
            await context.write(message)


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return UNPARSABLE

    return read


def _parsed(request: Any) -> Any:
    """The caller's message, or the stream of its messages. Raises InvalidRequest for a message that
    does not parse."""
    if request is UNPARSABLE:
        raise InvalidRequest(
            "the message does not parse as this method's request; caller and service must be of "
            "the same release"
        )
    return _Messages(request) if hasattr(request, "__aiter__") else request


class _Messages:
    """A caller's messages. Not a generator, because here a cancelled wait for the next message does
    not end the stream."""

    def __init__(self, messages: AsyncIterable[Any]) -> None:
        self._messages = messages
        self._iterator: AsyncIterator[Any] | None = None  # Made once it is read from.

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> Any:
        if self._iterator is None:
            self._iterator = aiter(self._messages)
        return _parsed(await anext(self._iterator))


class WorkerServicer(Generic[L]):
    """The calls of a worker, which raise Unavailable until ``loaded`` is set."""

    worker: ClassVar[str]  # In error messages: "the encoder".
    kind: ClassVar[Kind]

    def __init__(self, server: Server) -> None:
        self.server = server
        self.loaded: L | None = None

    def describe(self) -> Any:
        """The answer to Describe. Raises Unavailable while the worker loads."""
        raise NotImplementedError

    def require_loaded(self) -> L:
        if self.loaded is None:
            raise Unavailable(f"{self.worker} is loading its checkpoint", retry_after_s=1.0)
        return self.loaded
