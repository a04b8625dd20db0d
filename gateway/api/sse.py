"""Answers in OpenAI's shape: whole completions, chunks, usage, errors, and their SSE framing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opticnerve.errors import OpticNerveError

DONE = b"data: [DONE]\n\n"

_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}

LEAST_LOGPROB = -9999.0  # JSON has no infinity.

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(body: Mapping[str, Any]) -> bytes:
    """One SSE event. Its JSON holds no raw line break, so one ``data:`` line is enough."""
    return b"data: " + dumps(body) + b"\n\n"


def dumps(body: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON. A lone surrogate, which UTF-8 cannot hold, becomes ``?``.

    What Unicode calls a line break is escaped: SSE knows only CR and LF, but clients that split
    text into lines would cut an event there.
    """
    text = _encode(body)
    return (text if text.isascii() else text.translate(_BREAKS)).encode("utf-8", "replace")


def failure(error: OpticNerveError) -> bytes:
    """The end of a stream that failed: the body that an HTTP error would have had, and DONE."""
    return event(error.to_openai()) + DONE


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    image_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "image_tokens": self.image_tokens,
            },
        }


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token's log-probability as OpenAI shows it."""

    token: str
    logprob: float
    bytes: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        logprob = max(self.logprob, LEAST_LOGPROB)
        return {"token": self.token, "logprob": logprob, "bytes": list(self.bytes)}


@dataclass(frozen=True, slots=True)
class ContentLogprob:
    """The sampled token's log-probability and those of the most likely ones, best first."""

    sampled: TokenText
    top: tuple[TokenText, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**self.sampled.to_json(), "top_logprobs": [token.to_json() for token in self.top]}


def logprobs_json(content: Sequence[ContentLogprob] | None) -> dict[str, Any] | None:
    if content is None:
        return None
    return {"content": [token.to_json() for token in content], "refusal": None}


def encode_logprobs(content: Sequence[ContentLogprob]) -> bytes:
    """The entries of ``logprobs.content``, with commas between them."""
    return b",".join(dumps(token.to_json()) for token in content)


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice. ``finish_reason``: "stop" or "length"; ``stop_reason``: the stop
    string or stop token id that ended it, None for the model's own end. ``logprobs``: pieces that
    ``encode_logprobs`` made while the choice was written; at its end they may be megabytes."""

    index: int
    text: str
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: Sequence[bytes] | None = None

    def encode(self) -> bytes:
        body = {
            "index": self.index,
            "message": {"role": "assistant", "content": self.text, "refusal": None},
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self.logprobs is None:
            return _with(body, "logprobs", b"null")
        content = b",".join(self.logprobs)
        return _with(body, "logprobs", b'{"content":[' + content + b'],"refusal":null}')


def _with(body: Mapping[str, Any], name: str, value: bytes) -> bytes:
    """``body`` as JSON, with one more field whose value is JSON already."""
    return dumps(body)[:-1] + b',"' + name.encode() + b'":' + value + b"}"


@dataclass(frozen=True)
class ChatAnswer:
    """What every body of one answer shares, and the bodies. ``usage_in_stream`` is
    ``stream_options.include_usage``: chunks then carry ``usage``, which is null in all but the
    last, or, with ``continuous_usage_stats``, what all choices together have used so far."""

    id: str
    model: str
    system_fingerprint: str | None = None
    usage_in_stream: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(
        self, choices: Sequence[Choice], usage: Usage, extra: Mapping[str, Any] | None = None
    ) -> bytes:
        """The whole answer; ``extra`` holds fields of ours, such as ``timings``."""
        body = {**self._head("chat.completion"), "usage": usage.to_json(), **(extra or {})}
        encoded = b",".join(choice.encode() for choice in choices)
        return _with(body, "choices", b"[" + encoded + b"]")

    def role_chunk(self, index: int, usage: Usage | None = None) -> bytes:
        """A choice's first chunk."""
        return self._chunk(index, {"role": "assistant", "content": ""}, usage)

    def text_chunk(
        self,
        index: int,
        text: str,
        logprobs: Sequence[ContentLogprob] | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        return self._chunk(index, {"content": text}, usage, logprobs=logprobs)

    def finish_chunk(
        self,
        index: int,
        finish_reason: str,
        stop_reason: str | int | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        """A choice's last chunk. Its ``content`` is a string like every other's."""
        return self._chunk(
            index, {"content": ""}, usage, finish_reason=finish_reason, stop_reason=stop_reason
        )

    def usage_chunk(self, usage: Usage, extra: Mapping[str, Any] | None = None) -> bytes:
        """The chunk without choices that ends a stream, for usage (or timings)."""
        body = self._head("chat.completion.chunk")
        return event({**body, "choices": [], "usage": usage.to_json(), **(extra or {})})

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        usage: Usage | None,
        *,
        logprobs: Sequence[ContentLogprob] | None = None,
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs_json(logprobs),
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        body = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.usage_in_stream:
            body["usage"] = usage and usage.to_json()
        return event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }
