"""A request's deadline, and its timings by stage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway import metrics
from opticnerve.errors import DeadlineExceeded
from opticnerve.telemetry.metrics import STAGE_SECONDS

if TYPE_CHECKING:
    from gateway.workers.encode import Encoded

# Stages of the gateway that are metrics, under the same names; workers export their own.
EXPORTED = ("fetch",)
# Stages in a request's line of the log.
LOGGED = ("ttft", "fetch", "queue", "encoder_queue", "preprocess", "encode", "prefill", "decode")


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
        """This deadline, or ``seconds`` from now if that is sooner."""
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


class Stopwatch:
    """A request's timings: milliseconds by stage. The gateway's stages are measured here, those of
    workers are added."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.stages: dict[str, float] = {}
        self.first_token: float | None = None
        self._last_token = self.began

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self.add(name, seconds * 1000)
            if name in EXPORTED:
                STAGE_SECONDS.labels(name).observe(seconds)

    def add(self, name: str, milliseconds: float) -> None:
        self.stages[name] = self.stages.get(name, 0.0) + milliseconds

    def token(self) -> None:
        """To be called when tokens arrive."""
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
            metrics.TTFT_SECONDS.observe(now - self.began)
        else:
            metrics.INTER_TOKEN_SECONDS.observe(now - self._last_token)
        self._last_token = now

    def report(self, items: Sequence[Encoded | None], bytes_sent: int) -> dict[str, Any]:
        """Timings for the answer. ``items``: in the order of the request."""
        stages = self._all_stages(item for item in items if item)
        stages["total"] = (time.monotonic() - self.began) * 1000
        shown: dict[str, Any] = {f"{name}_ms": round(ms, 3) for name, ms in stages.items()}
        shown["items"] = [_item(item) for item in items]
        shown["bytes_to_encoders"] = bytes_sent
        return shown

    def log_fields(self, items: Iterable[Encoded]) -> dict[str, float]:
        """The stages so far, for the request's log line."""
        stages = self._all_stages(items)
        return {f"{name}_ms": stages[name] for name in LOGGED if name in stages}

    def _all_stages(self, items: Iterable[Encoded]) -> dict[str, float]:
        """All stages, with those of encoding (the longest of several pictures) and the TTFT."""
        encoding: dict[str, float] = {}
        for item in items:
            for stage, value in item.timings.items():
                name = f"encoder_{stage}" if stage == "queue" else stage
                encoding[name] = max(value, encoding.get(name, 0.0))
        if self.first_token is not None:
            encoding["ttft"] = (self.first_token - self.began) * 1000
        return {**self.stages, **encoding}


def _item(item: Encoded | None) -> Mapping[str, Any]:
    if item is None:
        return {"cached": "no"}
    stages = {f"{name}_ms": round(ms, 3) for name, ms in item.timings.items()}
    return {"cached": item.cached, "bytes_sent": item.bytes_sent, **stages}
