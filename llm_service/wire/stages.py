"""The stages of one generation, as metrics, spans and fields of the log, each once, however the
generation ends. The engine tells how long they took; here it is known when it began."""

from __future__ import annotations

import time

from llm_service.policy.messages import PrefilledEvent
from opticnerve.generation.values import Timings
from opticnerve.telemetry import logs, traces
from opticnerve.telemetry.metrics import STAGE_SECONDS


class GenerationStages:
    """``prompt_tokens``: of the request. ``received_at``: when it came, on the monotonic clock,
    which is that of ``time.perf_counter()`` too."""

    def __init__(self, prompt_tokens: int, received_at: float) -> None:
        self._prompt_tokens = prompt_tokens
        self._began = received_at
        self._first_token_at: float | None = None
        self._decode_s: float | None = None  # As the engine tells it, at the end.

    def prefilled(self, event: PrefilledEvent) -> None:
        """The first token has come."""
        now, timings = time.monotonic(), event.timings
        logs.note(cached_tokens=event.cached_tokens, ttft_ms=(now - self._began) * 1e3)
        queue_s, prefill_s = timings.queue_ms / 1e3, timings.prefill_ms / 1e3
        started = self._began + queue_s
        self._first_token_at = started + prefill_s
        self._observe("queue", queue_s, self._began)
        self._observe(
            "prefill",
            prefill_s,
            started,
            tokens=self._prompt_tokens - event.cached_tokens,
            cached_tokens=event.cached_tokens,
            cache="hit" if event.cached_tokens else "miss",
            embedding_wait_ms=timings.embedding_wait_ms or None,
        )

    def done(self, timings: Timings) -> None:
        """The engine has ended the generation. ``timings``: with the time of reading rows."""
        self._decode_s = timings.decode_ms / 1e3
        traces.current().set(preemptions=timings.preemptions)

    def ended(self, tokens: int, get_s: float) -> None:
        """The call ends. ``tokens`` were generated; ``get_s``: the time of reading rows."""
        if get_s:
            STAGE_SECONDS.labels("get").observe(get_s)
        if self._first_token_at is not None:
            so_far = time.monotonic() - self._first_token_at
            decode_s = so_far if self._decode_s is None else self._decode_s
            self._observe("decode", decode_s, self._first_token_at, tokens=tokens)

    def _observe(self, stage: str, seconds: float, began: float, **attributes: object) -> None:
        STAGE_SECONDS.labels(stage).observe(seconds)
        traces.record(stage, began, began + seconds, **attributes)
