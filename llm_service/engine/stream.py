"""A queue of one request's events, for one reader."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace

from llm_service.policy.messages import (
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    PromptLogprobsEvent,
    TokensEvent,
)
from opticnerve.errors import Overloaded

RELEASE_TIMEOUT_S = 30.0  # For the engine to end its step and release an aborted request.
TERMINAL = (FinishedEvent, FailedEvent, AbortedEvent)

MOST_UNREAD = 2**23  # Unread prompt log-probabilities of all streams: about a gigabyte.

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Unread:
    """The number of unread prompt log-probabilities, over all streams."""

    entries: int = 0


class EventStream:
    """Events of one request, in order, up to the terminal one.

    It has one reader, which uses ``async for event in stream`` or ``read()``. Tokens that arrive
    between two reads are merged into one TokensEvent per choice. Leaving the context (``with
    client.submit(...) as stream``) before the end aborts the request. If too many prompt
    log-probabilities are unread, the request fails with Overloaded.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None], unread: Unread) -> None:
        self.request_id = request_id
        self.ended = False  # The terminal event has arrived, perhaps unread.
        self._abort = abort
        self._closed = False
        self._pending: deque[Event] = deque()
        self._unread = unread
        self._own_unread = 0
        self._wake: asyncio.Future[None] | None = None

    async def read(self) -> list[Event]:
        """Waits for events and returns all that are pending; an empty list after the terminal
        event."""
        while not self._pending:
            if self.ended or self._closed:
                return []
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None
        events = coalesce(self._pending)
        self._clear()
        return events

    async def __aiter__(self) -> AsyncIterator[Event]:
        while events := await self.read():
            for event in events:
                yield event

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends reading; aborts the request if it has not ended."""
        if not self._closed and not self.ended:
            self._abort(self.request_id)
        self._closed = True
        self._clear()
        self._wake_reader()

    async def release(self) -> None:
        """Aborts the request if it still runs, and waits until the engine has released it."""
        if not self.ended:
            self._abort(self.request_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    while await self.read():
                        pass
            if not self.ended:
                log.error(
                    "the engine did not release an aborted request in %g s", RELEASE_TIMEOUT_S
                )
        self.close()

    def push(self, event: Event) -> None:
        """Appends an event; called by the EngineClient."""
        if isinstance(event, TERMINAL):
            self.ended = True
        if self._closed:
            return
        if isinstance(event, PromptLogprobsEvent):
            event = self._counted(event)
        self._pending.append(event)
        self._wake_reader()

    def _counted(self, event: PromptLogprobsEvent) -> Event:
        """Counts the event's log-probabilities. Returns the event; or, if too many would be unread,
        drops the pending events, aborts the request and returns its failure."""
        added = sum(1 + len(position.top) for position in event.positions)
        if self._unread.entries + added > MOST_UNREAD:
            self._clear()
            self._abort(self.request_id)
            return FailedEvent(
                self.request_id,
                Overloaded(
                    "too many prompt log-probabilities are waiting to be read; read faster, or ask "
                    "for fewer alternatives",
                    retry_after_s=1.0,
                ),
            )
        self._own_unread += added
        self._unread.entries += added
        return event

    def _clear(self) -> None:
        self._pending.clear()
        self._unread.entries -= self._own_unread
        self._own_unread = 0

    def _wake_reader(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def coalesce(events: Iterable[Event]) -> list[Event]:
    """The same events, with consecutive TokensEvents merged into one per choice."""
    merged: list[Event] = []
    runs: dict[int, list[TokensEvent]] = {}
    for event in events:
        if isinstance(event, TokensEvent):
            runs.setdefault(event.delta.choice, []).append(event)
            continue
        merged += map(_merge, runs.values())
        runs.clear()
        merged.append(event)
    merged += map(_merge, runs.values())
    return merged


def _merge(events: list[TokensEvent]) -> TokensEvent:
    if len(events) == 1:
        return events[0]
    deltas = [event.delta for event in events]
    whole = replace(
        deltas[-1],
        first_index=deltas[0].first_index,
        token_ids=tuple(itertools.chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(itertools.chain.from_iterable(delta.logprobs for delta in deltas)),
    )
    return TokensEvent(events[0].request_id, whole)
