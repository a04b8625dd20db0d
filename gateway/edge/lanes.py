"""Threads for work that would hold the event loop for long.

Two lanes, so that what is short does not wait behind what is long, and few threads, since each
that runs Python makes the event loop wait for the interpreter's lock. In its lane, work runs in
the order of coming. What a thread calls should be made of steps that are short, or that let the
lock go.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

LONG_BYTES = 2**22
_LONG = ThreadPoolExecutor(1, thread_name_prefix="long")
_SHORT = ThreadPoolExecutor(
    max(2, min(4, len(os.sched_getaffinity(0)))), thread_name_prefix="short"
)
P = ParamSpec("P")
T = TypeVar("T")


async def off_loop(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``work`` returns, from a thread; ``size``: bytes or characters that it looks at. Whoever
    is cancelled while it waits for a thread takes its work away again."""
    lane = _LONG if size > LONG_BYTES else _SHORT
    context = contextvars.copy_context()  # The request's id, for the log.
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(lane, lambda: context.run(work, *args, **kwargs))
