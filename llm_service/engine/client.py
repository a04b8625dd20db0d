"""The servicer's interface to an engine in another thread or process.

Commands and events are frozen values without tensors. Commands are queued, and events arrive by
``call_soon_threadsafe``, one call for all that are pending, so the event loop never waits for a
forward pass.

``ThreadEngineClient`` runs the engine in a thread of this process, ``ProcessEngineClient`` in a
spawned process, with pickles over a pipe between parent and child.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from llm_service.engine import main
from llm_service.engine.engine import Message
from llm_service.engine.main import (
    STOP_TIMEOUT_S,
    EngineEnded,
    EngineFactory,
    EngineReady,
    FromEngine,
    RowsDamaged,
)
from llm_service.engine.stream import EventStream, Unread
from llm_service.policy.engine_config import EngineConfig
from llm_service.policy.messages import (
    Abort,
    CheckIntegrity,
    Command,
    EngineStats,
    FailedEvent,
    GenerateRequest,
    IntegrityReport,
    RowsAvailable,
    RowsFailed,
    RowsReady,
    Stop,
)
from opticnerve.errors import EngineFailure, InvalidRequest, OpticNerveError

log = logging.getLogger(__name__)


class EngineClient:
    """The servicer's view of the engine. Methods belong to one event loop and never block it.

    Subclasses start an engine in ``_launch``, which calls ``_receive`` from its threads, pass
    commands on to it in ``_post``, and free what they started in ``_join``.
    """

    def __init__(
        self,
        factory: str | EngineFactory,
        config: Any,
        on_damage: Callable[[str], object] = lambda key: None,
    ) -> None:
        self._factory = factory
        self._on_damage = on_damage  # Gets keys whose rows the engine's own process found damaged.
        self._factory_config = config
        self._config: EngineConfig | None = None
        self.stats = EngineStats()  # As of the engine's last events.
        self._streams: dict[str, EventStream] = {}
        self._unread = Unread()
        self._checks: dict[int, asyncio.Future[str]] = {}  # Integrity checks, by ticket.
        self._num_checks = 0
        self._arrived: deque[FromEngine] = deque()
        self._drain_is_due = False
        self._launched = False
        self._closing = False
        self._loop: asyncio.AbstractEventLoop
        self._ready: asyncio.Future[None]
        self._ended: asyncio.Future[OpticNerveError | None]

    # ---- what subclasses do

    def _launch(self) -> None:
        raise NotImplementedError

    def _post(self, command: Command) -> None:
        raise NotImplementedError

    def _join(self) -> None:
        """Blocks until the thread or process is gone; called off the event loop."""
        raise NotImplementedError

    def _abandon(self) -> None:
        """Called instead of ``_join`` for an engine that is still loading, which ends by itself
        once it is built."""

    # ---- life

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests: started, and neither dead nor closed."""
        return self._config is not None and not self._ended.done() and not self._closing

    @property
    def config(self) -> EngineConfig:
        """The engine's limits; known after ``start``."""
        if self._config is None:
            raise RuntimeError("the engine is not started")
        return self._config

    async def start(self) -> None:
        """Returns when the engine is built. Raises what the factory raised, as OpticNerveError."""
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._ended = self._loop.create_future()
        self._launch()
        self._launched = True
        try:
            await self._ready
        except BaseException:
            await self.close()
            raise

    async def wait_dead(self) -> OpticNerveError:
        """Returns the error when the engine dies; never returns for one that is closed."""
        error = await asyncio.shield(self._ended)
        if error is None or self._closing:
            await self._loop.create_future()  # Closed, not dead.
        assert error is not None
        return error

    async def close(self) -> None:
        """Aborts open requests, stops the engine and ends its thread or process."""
        self._closing = True
        if not self._launched:
            return
        self._launched = False
        self._post(Stop())
        if self._config is None and not self._ended.done():
            self._abandon()
        else:
            await asyncio.to_thread(self._join)
        self._drain()
        self._end(EngineFailure("the engine was stopped"))

    # ---- commands

    def submit(self, request: GenerateRequest) -> EventStream:
        """Starts a request. Raises InvalidRequest if its id is in use, EngineFailure if the engine
        does not run. Other errors of the request arrive as its FailedEvent."""
        if not self.alive:
            raise EngineFailure("the engine is not running")
        if request.request_id in self._streams:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        stream = EventStream(request.request_id, self.abort, self._unread)
        self._streams[request.request_id] = stream
        self._post(request)
        return stream

    def abort(self, request_id: str) -> None:
        """Cancels a request. Its stream ends with AbortedEvent unless it ends otherwise before."""
        self._post(Abort(request_id))

    def rows_ready(self, key: str) -> None:
        """Tells the engine that the rows of ``key`` are loaded. An engine in a process of its own
        loads them itself, from the tier."""
        self._post(RowsReady(key))

    def rows_available(self, request_id: str, keys: Iterable[str]) -> None:
        """See ``RowsAvailable``."""
        self._post(RowsAvailable(request_id, frozenset(keys)))

    def rows_failed(self, request_id: str, key: str, error: Exception) -> None:
        """See ``RowsFailed``."""
        self._post(RowsFailed(request_id, key, error))

    async def check_integrity(self) -> None:
        """Raises EngineFailure if an invariant of the engine is violated, or it is dead."""
        if not self.alive:
            raise EngineFailure("the engine is not running")
        self._num_checks += 1
        ticket, answer = self._num_checks, self._loop.create_future()
        self._checks[ticket] = answer
        self._post(CheckIntegrity(ticket))
        try:
            problem = await answer
        finally:
            del self._checks[ticket]
        if problem:
            raise EngineFailure(problem)

    # ---- from the engine

    def _receive(self, message: FromEngine) -> None:
        """Hands a message over to the event loop; called from the engine's threads."""
        self._arrived.append(message)
        if not self._drain_is_due:
            self._drain_is_due = True
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._drain_is_due = False  # Reset before reading, so that later messages are not missed.
        while self._arrived:
            message = self._arrived.popleft()
            if isinstance(message, list):
                self._dispatch(message)
            elif isinstance(message, RowsDamaged):
                self._on_damage(message.key)
            elif isinstance(message, EngineReady):
                self._config = message.config
                self.stats = EngineStats(
                    blocks=message.config.num_blocks, free_blocks=message.config.num_blocks
                )
                if not self._ready.done():
                    self._ready.set_result(None)
            else:
                self._end(message.error)

    def _dispatch(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, EngineStats):
                self.stats = message
            elif isinstance(message, IntegrityReport):
                answer = self._checks.get(message.ticket)
                if answer is not None and not answer.done():
                    answer.set_result(message.problem)
            elif message.request_id in self._streams:  # Otherwise ``_end`` has failed the request.
                stream = self._streams[message.request_id]
                stream.push(message)
                if stream.ended:
                    del self._streams[message.request_id]

    def _end(self, error: OpticNerveError | None) -> None:
        """Fails everything that still waits for the engine, after its last message."""
        if self._ended.done():
            return
        self._ended.set_result(error)
        failure = error or EngineFailure("the engine was stopped")
        if not self._ready.done():
            self._ready.set_exception(failure)
        for answer in self._checks.values():
            if not answer.done():
                answer.set_exception(failure)
        for request_id in tuple(self._streams):
            self._streams.pop(request_id).push(FailedEvent(request_id, failure))


class ThreadEngineClient(EngineClient):
    """The engine in a thread of this process."""

    def _launch(self) -> None:
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        factory = main.import_factory(self._factory)
        self._thread = threading.Thread(
            target=main.run_engine,
            args=(factory, self._factory_config, self._inbox, self._receive),
            name="engine",
            daemon=True,
        )
        self._thread.start()

    def _post(self, command: Command) -> None:
        self._inbox.put(command)

    def _join(self) -> None:
        self._thread.join()


class ProcessEngineClient(EngineClient):
    """The engine in a spawned process. ``factory`` is "module:function"; ``config`` can be pickled.
    Two threads read and write the pipe, so that it never blocks the event loop."""

    def _launch(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._outbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._process = context.Process(
            target=main.run_engine_process,
            args=(theirs, self._factory, self._factory_config),
            daemon=True,
        )
        # Ctrl-C signals the whole process group; the parent alone handles it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()  # Inherits the mask.
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # Now the child holds the only copy, so its death closes the pipe.
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def _post(self, command: Command) -> None:
        self._outbox.put(command)

    def _read(self) -> None:
        try:
            while True:
                self._receive(self._pipe.recv())
        except (EOFError, OSError):
            pass  # The child has closed its end.
        except Exception:
            log.exception("the engine's process sent a message that cannot be read")
            self._process.kill()
        self._process.join(STOP_TIMEOUT_S)
        self._process.kill()  # No effect on one that has ended.
        self._process.join()
        code = self._process.exitcode
        self._receive(EngineEnded(EngineFailure(f"the engine's process ended with status {code}")))

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # The child is gone; the reader reports it.
            while (command := self._outbox.get()) is not None:
                self._pipe.send(command)

    def _abandon(self) -> None:
        self._process.kill()

    def _join(self) -> None:
        self._reader.join(STOP_TIMEOUT_S)
        if self._reader.is_alive():
            log.warning("the engine's process does not stop; killing it")
            self._process.kill()
            self._reader.join()
        self._outbox.put(None)
        self._writer.join()
        self._pipe.close()
        self._process.close()
