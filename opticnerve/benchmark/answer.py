"""One streamed answer as its client saw it. Times are in seconds of ``time.perf_counter``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

# Fields of a delta that are text of the answer; the second and third hold a model's reasoning.
TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    sent: float
    ended: float
    status: int = 0  # HTTP status; 0: no answer, or the connection broke.
    code: str = ""  # Code of an error in the body, the stream or the transport; "": none.
    times: tuple[float, ...] = ()  # When each chunk with text arrived.
    prompt_tokens: int = 0
    output_tokens: int = 0
    done: bool = False  # Whether the stream ended with [DONE].
    cached_tokens: int | None = None  # Prompt tokens; None: not reported.
    text: str = field(default="", repr=False)
    timings: dict[str, Any] | None = None  # By stage, if the request asks OpticNerve for them.
    scheduled: float | None = None  # When it was due; None: no fixed time.

    @property
    def outcome(self) -> str:
        """``answered``; ``refused``, with a typed error; or ``lost``: it ended without either."""
        if self.status == 200 and self.done and not self.code:
            return "answered"
        return "refused" if self.code and (self.done or self.status not in (0, 200)) else "lost"

    @property
    def due(self) -> float:
        """The time from which its user waits."""
        return self.sent if self.scheduled is None else self.scheduled

    @property
    def has_usage(self) -> bool:
        """Whether the server has said how many tokens there were."""
        return bool(self.prompt_tokens or self.output_tokens)

    @property
    def ttft(self) -> float | None:
        """Seconds from ``due`` to the first text."""
        return self.times[0] - self.due if self.times else None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None if there is only one."""
        if not self.times or self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk with text and the next: inter-token latencies."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def e2e(self) -> float:
        """Seconds from ``due`` to the end."""
        return self.ended - self.due


class AnswerStream:
    """Collects the server-sent events of one answer."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.code = ""
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens: int | None = None
        self.timings: dict[str, Any] | None = None
        self.done = False
        self._texts: list[str] = []
        self._rest = b""  # The incomplete last line so far.

    def feed(self, piece: bytes, now: float) -> None:
        """Takes bytes that arrived at ``now``. Raises ValueError for events that are not chunks of
        a chat completion."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError("an event is no object")
        try:
            self._chunk(event, now)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"an event is no chunk: {error}") from error

    def _chunk(self, event: dict[str, Any], now: float) -> None:
        if event.get("error"):
            self.code = error_code(event)
        if usage := event.get("usage"):
            self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.output_tokens = int(usage.get("completion_tokens") or 0)
            details = usage.get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens")
            self.cached_tokens = None if cached is None else int(cached)
        if timings := event.get("timings"):
            self.timings = {**timings}
        deltas = [choice.get("delta") or {} for choice in event.get("choices") or ()]
        text = "".join(delta.get("content") or "" for delta in deltas)
        if any(delta.get(name) for delta in deltas for name in TEXTS):
            self.times.append(now)
            self._texts.append(text)

    def answer(self, sent: float, ended: float, status: int, code: str = "") -> Answer:
        """The answer so far. ``code``: the code of an error outside of the stream."""
        return Answer(
            sent,
            ended,
            status,
            code or self.code,
            tuple(self.times),
            self.prompt_tokens,
            self.output_tokens,
            self.done,
            self.cached_tokens,
            "".join(self._texts),
            self.timings,
        )


def error_code(body: Any) -> str:
    """The code, or else the type, of an error in OpenAI's form; ``unknown`` for any other body."""
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    return str(error.get("code") or error.get("type") or "unknown")


def body_code(body: bytes) -> str:
    """``error_code`` of a body's bytes."""
    try:
        return error_code(json.loads(body))
    except ValueError:
        return "unknown"
