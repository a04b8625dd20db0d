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
from opticnerve.telemetry import traces
from opticnerve.telemetry.metrics import STAGE_SECONDS

if TYPE_CHECKING:
    from gateway.workers.encode import Encoded

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


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """A stage of a request, or of its item with the index ``item``. ``began`` is on the monotonic
    clock, in seconds."""

    name: str
    began: float
    ms: float
    item: int | None = None

    def shown(self, origin: float) -> dict[str, Any]:
        """For the answer. The begin is in milliseconds from ``origin``; negative for work that
        another request started earlier."""
        placed = {
            "stage": self.name,
            "begin_ms": round((self.began - origin) * 1000, 3),
            "ms": round(self.ms, 3),
        }
        return placed if self.item is None else {**placed, "item": self.item}


class Stopwatch:
    """A request's timings: milliseconds by stage. The gateway's stages are measured here, and are
    metrics and spans under the same names; workers' stages are added to them."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.stages: dict[str, float] = {}
        self.first_token: float | None = None
        self._last_token = self.began
        self._placed: list[PlacedStage] = []  # The stages measured here.

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[traces.TraceSpan]:
        began = time.monotonic()
        try:
            with traces.span(name) as span:
                yield span
        finally:
            self.ended(name, began, traced=False)

    def ended(self, name: str, began: float, *, traced: bool = True) -> None:
        """Records a stage that began at ``began`` (monotonic seconds) and ends now. ``traced``:
        also record it as a span."""
        now = time.monotonic()
        if traced:
            traces.record(name, began, now)
        self._placed.append(PlacedStage(name, began, (now - began) * 1000))
        self.measured(name, now - began)

    def measured(self, name: str, seconds: float) -> None:
        """Adds a stage of the gateway that took ``seconds``, also to the metrics."""
        self.add(name, seconds * 1000)
        STAGE_SECONDS.labels(name).observe(seconds)

    def add(self, name: str, milliseconds: float) -> None:
        self.stages[name] = self.stages.get(name, 0.0) + milliseconds

    def token(self) -> None:
        """Call this when tokens arrive: records TTFT, then inter-token times."""
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
            metrics.TTFT_SECONDS.observe(now - self.began)
        else:
            metrics.INTER_TOKEN_SECONDS.observe(now - self._last_token)
        self._last_token = now

    @property
    def decode_ms(self) -> float:
        """Milliseconds from the arrival of the first token to that of the latest one."""
        return (self._last_token - (self.first_token or self._last_token)) * 1000

    def report(
        self, items: Sequence[Encoded | None], tokens: Sequence[int], bytes_sent: int
    ) -> dict[str, Any]:
        """Timings for the answer. ``items``: in the order of the request; ``tokens``: the number of
        tokens of each."""
        stages = self._all_stages(item for item in items if item)
        stages["total"] = (time.monotonic() - self.began) * 1000
        shown: dict[str, Any] = {f"{name}_ms": round(ms, 3) for name, ms in stages.items()}
        shown["items"] = [
            {"tokens": count, **_item(item)} for item, count in zip(items, tokens, strict=True)
        ]
        shown["bytes_to_encoders"] = bytes_sent
        shown["stages"] = [placed.shown(self.began) for placed in self._all_placed(items)]
        return shown

    def _all_placed(self, items: Sequence[Encoded | None]) -> list[PlacedStage]:
        """Every stage on this process's clock, ordered by begin. Workers report durations alone, so
        their stages are placed by what the gateway saw: an encoder's end when its answer arrives,
        an LLM worker's prefill with the first token and its decode with the last, and reading rows
        begins when the last reference is known."""
        placed = list(self._placed)
        ready = self.began
        for index, item in enumerate(items):
            if item is not None and item.timings:
                placed += _chain(item.answered, _named(item.timings), index)
                ready = max(ready, item.answered)
        generation = {name: self.stages.get(name, 0.0) for name in ("queue", "prefill", "decode")}
        first = self.first_token or self._last_token
        if any(generation.values()):
            # Each token arrived some time after it was sampled. Of the two placements of prefill's
            # end, by first token and by last, the earlier one is closer to the truth.
            late_s = self._last_token - generation["decode"] / 1000 - first
            chain = _chain(self._last_token - max(0.0, late_s), generation)
            rows = PlacedStage("get", max(ready, chain[0].began), self.stages.get("get", 0.0))
            placed += [*chain, rows]
        else:  # A stop string ended it: the worker sent no timings.
            placed.append(PlacedStage("decode", first, (self._last_token - first) * 1000))
        return sorted((each for each in placed if each.ms > 0), key=lambda each: each.began)

    def log_fields(self, items: Iterable[Encoded]) -> dict[str, float]:
        """The stages so far, for the request's log line."""
        stages = self._all_stages(items)
        return {f"{name}_ms": stages[name] for name in LOGGED if name in stages}

    def _all_stages(self, items: Iterable[Encoded]) -> dict[str, float]:
        """All stages, with those of encoding (the longest of several pictures) and the TTFT."""
        encoding: dict[str, float] = {}
        for item in items:
            for name, value in _named(item.timings).items():
                encoding[name] = max(value, encoding.get(name, 0.0))
        if self.first_token is not None:
            encoding["ttft"] = (self.first_token - self.began) * 1000
        return {**self.stages, **encoding}


def _named(timings: Mapping[str, float]) -> dict[str, float]:
    """An encoder's stages, with its queue renamed so that it differs from an LLM worker's."""
    return {"encoder_queue" if name == "queue" else name: ms for name, ms in timings.items()}


def _chain(ended: float, stages: Mapping[str, float], item: int | None = None) -> list[PlacedStage]:
    """Consecutive stages, the last of which ends at ``ended``."""
    began = ended - sum(stages.values()) / 1000
    placed = []
    for name, ms in stages.items():
        placed.append(PlacedStage(name, began, ms, item))
        began += ms / 1000
    return placed


def _item(item: Encoded | None) -> Mapping[str, Any]:
    if item is None:
        return {"cached": "no"}
    stages = {f"{name}_ms": round(ms, 3) for name, ms in item.timings.items()}
    return {"cached": item.cached, "bytes_sent": item.bytes_sent, **stages}
