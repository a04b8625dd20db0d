"""Work that a service lets end when it stops, and cuts when it takes too long.

The same for every service: once a signal has come, work under way gets ``drain_timeout_s``; what
still runs then, or when a second signal comes, fails with a typed error, so that whoever waits for
it is told instead of cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from opticnerve.errors import Unavailable

LAST_WORDS_S = 3.0  # What work that was cut gets to free what it holds, and to say why it ends.


class Running:
    """The work of one service, on one event loop."""

    def __init__(self, who: str) -> None:
        self._who = who  # For the error's text: "the LLM worker".
        self._limits: set[asyncio.Timeout] = set()
        self._cut = False

    @contextlib.asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """Around one piece of work; such contexts do not nest. Raises Unavailable when ``cut``
        ends the work, or has come before it."""
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

    def farewell(self, patience_s: float) -> str:
        """What a service says when it is asked to stop."""
        number = len(self._limits)
        if not number:
            return "stopping: no request runs"
        runs = "1 request runs" if number == 1 else f"{number} requests run"
        return f"stopping: {runs}, for at most {patience_s:g} s; a second signal ends it now"

    def cut(self) -> None:
        """Ends all work that is under way, and what would still begin."""
        if self._cut:
            return
        self._cut = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            limit.reschedule(now)

    def _stopped(self) -> Unavailable:
        return Unavailable(
            f"{self._who} is stopping and could not finish in time; send the request again",
            retry_after_s=1.0,
        )
