"""Where a request's time goes, in milliseconds by stage; stage names are those of the metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gateway import metrics

if TYPE_CHECKING:
    from gateway.workers.encode import Encoded

LOGGED = ("ttft", "fetch", "queue", "encoder_queue", "preprocess", "encode", "prefill", "decode")


class Stopwatch:
    """One request's clock. Stages of the gateway are measured; those of workers are added."""

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
            self.add(name, (time.monotonic() - began) * 1000)

    def add(self, name: str, milliseconds: float) -> None:
        self.stages[name] = self.stages.get(name, 0.0) + milliseconds

    def token(self) -> None:
        """Tokens have come."""
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
            metrics.TTFT_SECONDS.observe(now - self.began)
        else:
            metrics.INTER_TOKEN_SECONDS.observe(now - self._last_token)
        self._last_token = now

    def report(self, items: Sequence[Encoded | None], bytes_sent: int) -> dict[str, Any]:
        """What a client that asks for timings gets. ``items``: in the order of the request."""
        now = time.monotonic()
        stages = self._with_encoding(item for item in items if item)
        shown: dict[str, Any] = {f"{name}_ms": round(ms, 3) for name, ms in stages.items()}
        if self.first_token is not None:
            shown["ttft_ms"] = round((self.first_token - self.began) * 1000, 3)
        shown["total_ms"] = round((now - self.began) * 1000, 3)
        shown["items"] = [_item(item) for item in items]
        shown["bytes_to_encoders"] = bytes_sent
        return shown

    def told(self, items: Iterable[Encoded]) -> dict[str, float]:
        """What the request's line in the log says, of what is known so far."""
        stages = self._with_encoding(items)
        if self.first_token is not None:
            stages["ttft"] = (self.first_token - self.began) * 1000
        return {f"{name}_ms": stages[name] for name in LOGGED if name in stages}

    def _with_encoding(self, items: Iterable[Encoded]) -> dict[str, float]:
        """All stages; of several pictures' the longest."""
        encoding: dict[str, float] = {}
        for item in items:
            for stage, value in item.timings.items():
                name = f"encoder_{stage}" if stage == "queue" else stage
                encoding[name] = max(value, encoding.get(name, 0.0))
        return {**self.stages, **encoding}

    def observe(self) -> None:
        """Hands the gateway's own stages to the metrics, once, at the end."""
        if "fetch" in self.stages:
            metrics.STAGE_SECONDS.labels("fetch").observe(self.stages["fetch"] / 1000)


def _item(item: Encoded | None) -> Mapping[str, Any]:
    if item is None:
        return {"cached": "no"}
    stages = {f"{name}_ms": round(ms, 3) for name, ms in item.timings.items()}
    return {"cached": item.cached, "bytes_sent": item.bytes_sent, **stages}
