"""The point in time by which a request must end, passed from stage to stage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from opticnerve.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """``at`` is on the monotonic clock, in seconds."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())

    def within(self, seconds: float) -> Deadline:
        """This deadline, or ``seconds`` from now where that is sooner."""
        return Deadline(min(self.at, time.monotonic() + seconds))

    def check(self) -> None:
        """Raises DeadlineExceeded once the deadline has passed."""
        if self.remaining() == 0.0:
            raise expired()

    @contextlib.asynccontextmanager
    async def timeout(self) -> AsyncIterator[None]:
        """Cancels the body at the deadline. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(self.remaining()):
                yield
        except TimeoutError as error:
            raise expired() from error


def expired() -> DeadlineExceeded:
    return DeadlineExceeded(
        "the request took longer than its deadline; retry later, "
        "ask for fewer tokens or smaller pictures, or raise --request-timeout-s"
    )
