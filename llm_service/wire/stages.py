"""Records the stages of one generation as metrics, spans and log fields, each once, however the
generation ends. The engine reports their durations; they are placed in time from the request's
arrival."""

from __future__ import annotations

import time

from llm_service.policy.messages import PrefilledEvent
from opticnerve.generation.values import Timings
from opticnerve.telemetry import logs, traces
from opticnerve.telemetry.metrics import STAGE_SECONDS


class GenerationStages:
    """``prompt_tokens``: number of the prompt's tokens. ``received_at``: when the request arrived,
    in seconds of the monotonic clock, which ``time.perf_counter()`` reads too."""

    def __init__(self, prompt_tokens: int, received_at: float) -> None:
        self._prompt_tokens = prompt_tokens
        self._began = received_at
        self._first_token_at: float | None = None
        self._decode_s: float | None = None  # Reported by the engine at the end.

    def prefilled(self, event: PrefilledEvent) -> None:
        """Records queue and prefill, when the prompt is computed."""
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
        """Takes the engine's timings of a finished generation."""
        self._decode_s = timings.decode_ms / 1e3
        traces.current().set(preemptions=timings.preemptions)

    def ended(self, tokens: int, get_s: float) -> None:
        """Records decode and the reading of rows, when the call ends. ``tokens``: number generated;
        ``get_s``: seconds spent on reading rows."""
        if get_s:
            STAGE_SECONDS.labels("get").observe(get_s)
        if self._first_token_at is not None:
            so_far = time.monotonic() - self._first_token_at
            decode_s = so_far if self._decode_s is None else self._decode_s
            self._observe("decode", decode_s, self._first_token_at, tokens=tokens)

    def _observe(self, stage: str, seconds: float, began: float, **attributes: object) -> None:
        STAGE_SECONDS.labels(stage).observe(seconds)
        traces.record(stage, began, began + seconds, **attributes)
