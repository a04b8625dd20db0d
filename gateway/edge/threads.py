"""Threads for work that would block the event loop.

There are three executors, so that short work does not wait behind long work, and few threads, since
each one that runs Python makes the event loop wait for the GIL. Each executor runs its work in
order of arrival. Work should consist of steps that are short or release the GIL.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar, TypeVarTuple

LONG_BYTES = 2**22
_LONG = ThreadPoolExecutor(1, thread_name_prefix="long")
_SHORT = ThreadPoolExecutor(
    max(2, min(4, len(os.sched_getaffinity(0)))), thread_name_prefix="short"
)
_GRAMMARS = ThreadPoolExecutor(2, thread_name_prefix="grammars")
P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def off_loop(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``work`` in a thread and returns its result. ``size``: the number of bytes or characters
    that it reads. If the caller is cancelled before a thread is free, it does not run."""
    executor = _LONG if size > LONG_BYTES else _SHORT
    return await _run(executor, functools.partial(work, *args, **kwargs))


async def off_loop_for_grammars(work: Callable[[*Ts], T], *args: *Ts) -> T:
    """Like ``off_loop``, on threads of their own for grammars, some of which take a second."""
    return await _run(_GRAMMARS, functools.partial(work, *args))


async def _run(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    context = contextvars.copy_context()  # Carries the request's id into the thread's log lines.
    return await asyncio.get_running_loop().run_in_executor(executor, lambda: context.run(work))


async def off_loop_above(limit: int, size: int, work: Callable[[*Ts], T], *args: *Ts) -> T:
    """Runs ``work`` on the event loop if ``size`` is at most ``limit``, else in a thread."""
    return await off_loop(size, work, *args) if size > limit else work(*args)
