"""Answers in OpenAI's shape, read back by OpenAI's own client types."""

from __future__ import annotations

import json
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.api import sse
from gateway.api.sse import ChatAnswer, Choice, ContentLogprob, TokenText, Usage
from opticnerve.errors import EngineFailure

ANSWER = ChatAnswer("chatcmpl-1", "model", "fp_1", created=7)
LOGPROB = ContentLogprob(TokenText("é", -0.5, (0xC3, 0xA9)), (TokenText("e", -1.0, (0x65,)),))


def read(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    body: dict[str, Any] = json.loads(event[6:])
    return body


def test_a_whole_answer() -> None:
    pieces = [sse.encode_logprobs([LOGPROB, LOGPROB]), sse.encode_logprobs([LOGPROB])]
    choices = [Choice(0, "A cat.", "stop", "###", pieces), Choice(1, "", "length")]
    encoded = ANSWER.completion(choices, Usage(20, 5, 16, 9), {"timings": {"encode_ms": 1.5}})
    body = json.loads(encoded)
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert parsed.choices[0].message.content == "A cat."
    assert parsed.choices[0].message.role == "assistant"
    assert parsed.choices[1].finish_reason == "length"
    assert parsed.choices[1].message.content == ""
    assert parsed.choices[0].logprobs is not None
    assert parsed.choices[0].logprobs.content is not None
    assert len(parsed.choices[0].logprobs.content) == 3
    assert parsed.choices[1].logprobs is None
    assert parsed.choices[0].logprobs.content[0].bytes == [0xC3, 0xA9]
    assert parsed.choices[0].logprobs.content[0].top_logprobs[0].token == "e"
    assert parsed.usage is not None and parsed.usage.total_tokens == 25
    assert parsed.usage.prompt_tokens_details is not None
    assert parsed.usage.prompt_tokens_details.cached_tokens == 16
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == 9
    assert body["choices"][0]["stop_reason"] == "###"
    assert body["timings"] == {"encode_ms": 1.5}


def test_a_stream() -> None:
    events = [
        ANSWER.role_chunk(0),
        ANSWER.text_chunk(0, "A\n\ncat é 🤗", [LOGPROB]),
        ANSWER.finish_chunk(0, "stop"),
        ANSWER.usage_chunk(Usage(3, 2)),
    ]
    chunks = [ChatCompletionChunk.model_validate(read(event), strict=True) for event in events]
    assert {(c.id, c.created, c.model, c.object) for c in chunks} == {
        ("chatcmpl-1", 7, "model", "chat.completion.chunk")
    }
    assert chunks[0].choices[0].delta.role == "assistant"
    text = ""
    for chunk in chunks[:-1]:
        text += chunk.choices[0].delta.content  # type: ignore[operator] # Never None.
    assert text == "A\n\ncat é 🤗"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 5


def test_usage_is_null_until_the_end_where_it_was_asked_for() -> None:
    asked = ChatAnswer("1", "m", usage_in_stream=True)
    assert read(asked.text_chunk(0, "x"))["usage"] is None
    assert "usage" not in read(ANSWER.text_chunk(0, "x"))


def test_a_failure_after_the_stream_began() -> None:
    told = sse.failure(EngineFailure("the step failed"))
    assert told.endswith(sse.DONE)
    body = read(told.removesuffix(sse.DONE))
    assert body["error"]["message"] == "the step failed"
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_what_json_cannot_hold() -> None:
    assert json.loads(sse.dumps({"a": "\ud800x"})) == {"a": "?x"}
    assert TokenText("x", float("-inf"), ()).to_json()["logprob"] == -9999.0


def test_no_line_break_of_any_kind_within_an_event() -> None:
    text = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\r\n\u00e9"
    event = ANSWER.text_chunk(0, text)
    assert len(event.decode().splitlines()) == 2
    assert read(event)["choices"][0]["delta"]["content"] == text
    assert "\u00e9" in event.decode()


def test_the_end() -> None:
    assert sse.DONE == b"data: [DONE]\n\n"
