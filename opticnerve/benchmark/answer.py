"""One streamed answer as its client saw it. Times are seconds of ``time.perf_counter``."""

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
    status: int = 0  # Of HTTP; 0: no answer came, or its connection broke.
    code: str = ""  # Of the error in the body or in the stream, or the transport's own; "": none.
    times: tuple[float, ...] = ()  # When each chunk with text came.
    prompt_tokens: int = 0
    output_tokens: int = 0
    done: bool = False  # The stream came to its own end, [DONE].
    cached_tokens: int | None = None  # Of the prompt; None: the server does not say.
    text: str = field(default="", repr=False)
    timings: dict[str, Any] | None = None  # By stage, where the body asks OpticNerve for them.
    scheduled: float | None = None  # When it was to be sent; None: it was sent when it could be.

    @property
    def outcome(self) -> str:
        """``answered``; ``refused`` by a typed error; or ``lost``: neither, an end without one."""
        if self.status == 200 and self.done and not self.code:
            return "answered"
        return "refused" if self.code and (self.done or self.status not in (0, 200)) else "lost"

    @property
    def due(self) -> float:
        """The time from which its user waits."""
        return self.sent if self.scheduled is None else self.scheduled

    @property
    def ttft(self) -> float | None:
        """Seconds from ``due`` to the first text."""
        return self.times[0] - self.due if self.times else None

    @property
    def tpot(self) -> float | None:
        """Seconds for each output token after the first; None if there is none."""
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
        self._rest = b""  # Of the last piece: a line that has not ended.

    def feed(self, piece: bytes, now: float) -> None:
        """Bytes of the stream, which came at ``now``. Raises ValueError for events that are no
        chunks of chat completions."""
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
        """The answer so far. ``code``: of an error that is not in the stream."""
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
    """The code of an error in OpenAI's form, or its type; ``unknown`` in any other body."""
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    return str(error.get("code") or error.get("type") or "unknown")


def body_code(body: bytes) -> str:
    """The same of a body's bytes."""
    try:
        return error_code(json.loads(body))
    except ValueError:
        return "unknown"
