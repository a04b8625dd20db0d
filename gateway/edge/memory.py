"""Memory goes back to the system once large requests are over.

The allocator keeps what bodies and pictures took, in case it is wanted again. Under load that is
right; afterwards it would be counted against this process for ever.
"""

from __future__ import annotations

import asyncio
import ctypes

from opticnerve.process import return_freed_memory

LARGE_BYTES = 4 * 2**20  # Requests that held less leave little behind.
QUIET_S = 1.0
M_ARENA_MAX = -8  # Of malloc.h.


def use_one_arena() -> None:
    """All threads share one heap (glibc), so that little memory is kept and all of it can go.

    Called before threads start. Python's lock makes them take turns anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


class Trimmer:
    """Trims once, when no large request has ended for ``quiet_s``."""

    def __init__(self, quiet_s: float = QUIET_S) -> None:
        self.quiet_s = quiet_s
        self._timer: asyncio.TimerHandle | None = None

    def ended(self, held_bytes: int) -> None:
        """A request ended that held ``held_bytes`` at most."""
        if held_bytes < LARGE_BYTES:
            return
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(self.quiet_s, loop.run_in_executor, None, return_freed_memory)
