"""What ties a service's process to those around it: the one that started it, and whoever hangs up.

SIGHUP ends no service. It asks for files to be read again: the gateway's keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

POLL_S = 0.5
GRACE_S = 5.0


def follow_parent(parent_pid: int, grace_s: float = GRACE_S) -> None:
    """Ends this process within seconds of its parent's end; 0: it stands alone.

    A thread, not a task: it also works while weights load and while the event loop is busy.
    First SIGTERM to ourselves, for an orderly stop; after ``grace_s``, the end.
    """
    if parent_pid == 0:
        return
    threading.Thread(
        target=_follow, args=(parent_pid, grace_s), name="follow-parent", daemon=True
    ).start()


def _follow(parent_pid: int, grace_s: float) -> None:
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    with contextlib.suppress(OSError):  # Whoever read our output is gone too.
        print("the parent process is gone; stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)


def ignore_hangup() -> None:
    """From here on SIGHUP does nothing to this process, nor to those that it starts."""
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
