"""A worker's membership in the registry: it joins, sends heartbeats, and leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from opticnerve.registry.entry import WorkerEntry
from opticnerve.registry.redis_registry import HEARTBEAT_S, Registry

LEAVE_S = 1.0  # Time to remove its entry, within the time that a process has to end.

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def joined(
    registry: Registry, describe: Callable[[], WorkerEntry]
) -> AsyncIterator[Callable[[], None]]:
    """Keeps a worker in the registry while the context lasts, also through failures of Redis;
    removes it at the end, and closes ``registry``. Yields a function to call when the worker's
    state has changed: the state is written at once; its load only with the next heartbeat."""
    changed = asyncio.Event()
    entry = describe()
    beating = asyncio.create_task(_beat(registry, describe, changed))
    try:
        yield changed.set
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await registry.remove(entry)
        await registry.close()


async def _beat(
    registry: Registry, describe: Callable[[], WorkerEntry], changed: asyncio.Event
) -> None:
    while True:
        changed.clear()
        try:
            await registry.put(describe())
        except Exception:  # Must not end: only this task keeps the worker listed.
            log.exception("the registry has not heard of this worker")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await changed.wait()
