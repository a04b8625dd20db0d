"""What ties a child process to the one that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

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
