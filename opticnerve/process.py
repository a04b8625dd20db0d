"""A service's process: how it follows its parent, handles signals, and finishes its work before it
stops.

SIGTERM and SIGINT stop a service (``handle_signals``). Work under way gets the service's drain
timeout. Work that still runs then, or at a second signal, fails with a typed error, so that its
caller gets an answer instead of a broken connection (``Running``). SIGHUP stops no service; it
makes the gateway read its keys again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

from opticnerve.errors import Unavailable

POLL_S = 0.5  # Between looks at the parent's process id.
GRACE_S = 5.0  # For an orderly stop once the parent is gone.
LAST_WORDS_S = 3.0  # For work that was cut: to free its resources and send its error.

# The same signal twice within this time is one: a terminal sends Ctrl-C to a whole process group,
# and a wrapper in it may pass it on; a service manager may signal `up` and its children.
ECHO_S = 0.3
_M_ARENA_MAX = -8  # From malloc.h.


def follow_parent(parent_pid: int, grace_s: float = GRACE_S) -> None:
    """Ends this process within seconds of its parent's end. 0: there is no parent to follow.

    A thread, not a task: it also works while weights load and while the event loop is busy.
    It sends SIGTERM to this process for an orderly stop, and ends it after ``grace_s``.
    """
    if parent_pid == 0:
        return
    threading.Thread(
        target=_follow, args=(parent_pid, grace_s), name="follow-parent", daemon=True
    ).start()


def _follow(parent_pid: int, grace_s: float) -> None:
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    with contextlib.suppress(OSError):  # The reader of our stderr may be gone too.
        print("the parent process is gone; stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)


def ignore_hangup() -> None:
    """From here on SIGHUP does nothing to this process, nor to the processes that it starts."""
    with contextlib.suppress(ValueError):  # Not the main thread.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextlib.contextmanager
def on_hangup(call: Callable[[], None]) -> Iterator[None]:
    """While the context lasts, SIGHUP calls ``call`` on the running event loop; afterwards it does
    nothing."""
    loop = asyncio.get_running_loop()
    installed = False
    with contextlib.suppress(ValueError, RuntimeError):  # Not the main thread.
        loop.add_signal_handler(signal.SIGHUP, call)
        installed = True
    try:
        yield
    finally:
        if installed:
            loop.remove_signal_handler(signal.SIGHUP)
            ignore_hangup()


@contextlib.contextmanager
def handle_signals(
    stop: Callable[[], None],
    cut: Callable[[], None],
    at_once: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """While the context lasts, SIGTERM or SIGINT calls ``stop``, and a second one ``cut``.

    A third calls ``at_once`` and ends the process immediately. A repetition within ECHO_S does not
    count. Once a signal has arrived, counting goes on after the context: a second signal does not
    interrupt the clean-up of a stopping process, and a third ends it.
    """
    loop = asyncio.get_running_loop()
    steps = [cut, stop]
    last, at = 0, 0.0

    def on_signal(number: int, _: object = None) -> None:
        nonlocal last, at
        now = time.monotonic()
        if number == last and now - at < ECHO_S:
            return
        last, at = number, now
        if not steps:
            at_once()
            os._exit(128 + number)
        steps.pop()()

    installed = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, RuntimeError):  # Not the main thread.
            loop.add_signal_handler(number, on_signal, number)
            installed.append(number)
    try:
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)
            if last:
                signal.signal(number, on_signal)
        steps[:] = [lambda: None] * len(steps)


def announce(line: str) -> None:
    """Prints a line for whoever started this process; ignores errors, since they may be gone."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def use_one_arena() -> None:
    """Makes all threads share one malloc arena (glibc only), so that less freed memory is kept.
    Call it before threads start. It costs little time: the GIL makes threads take turns anyway."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Returns freed memory to the system (glibc only).

    Otherwise the allocator keeps more than 100 MB after a vocabulary of 150,000 tokens was read,
    and about a fifth of a model's size after its weights were laid out anew.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not.
        if trim is not None:
            trim(0)


class Running:
    """The work under way in one service, on one event loop. ``stop`` drains it; ``cut`` ends what
    still runs. Second calls do nothing."""

    def __init__(
        self, service: str, log: logging.Logger, drain_timeout_s: float, delay_s: float = 0.0
    ) -> None:
        """``service``: its name in errors, such as "the LLM worker". ``log``: where the stop is
        reported. ``delay_s``: how long new work is still accepted after ``stop``."""
        self.draining = False  # Whether it was asked to stop.
        self.closed = asyncio.Event()  # Set once it takes no new work.
        self.on_cut: Callable[[], object] = lambda: None
        self._service = service
        self._log = log
        self._drain_timeout_s = drain_timeout_s
        self._delay_s = delay_s
        self._limits: set[asyncio.Timeout] = set()
        self._cut = False
        self._timer: asyncio.TimerHandle | None = None  # The next step of stopping.

    @contextlib.asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """Surrounds one piece of work; does not nest. Raises Unavailable when ``cut`` ends the
        work, or was called before it began."""
        if self._cut:
            raise self._stopped()
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError as error:
            if limit.expired():
                raise self._stopped() from error
            raise

    def stop(self) -> None:
        """Takes no new work after ``delay_s``; work under way then gets ``drain_timeout_s``."""
        self.draining = True
        if self._timer is not None:
            return
        if not self._delay_s:
            self._close()
            return
        self._log.info(
            "stopping in %g s, and taking requests until then; a second signal ends it now",
            self._delay_s,
        )
        self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._close)

    def cut(self) -> None:
        """Ends all work under way, and refuses new work."""
        self.draining = True
        self._close()
        if self._cut:
            return
        self._cut = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            limit.reschedule(now)
        self.on_cut()

    def drained(self) -> None:
        """Call this when no work is under way any more: cancels the pending ``cut``."""
        if self._timer is not None:
            self._timer.cancel()

    def _close(self) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        number = len(self._limits)
        runs = "1 request runs" if number == 1 else f"{number} requests run"
        rest = f", for at most {self._drain_timeout_s:g} s; a second signal ends it now"
        self._log.info("stopping: " + (runs + rest if number else "no request runs"))
        self._timer = asyncio.get_running_loop().call_later(self._drain_timeout_s, self.cut)

    def _stopped(self) -> Unavailable:
        return Unavailable(
            f"{self._service} is stopping and could not finish in time; send the request again",
            retry_after_s=1.0,
        )
