"""Answers in OpenAI's shape, read back by OpenAI's own client types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.api import sse
from gateway.api.answer import WholeCall, WholeChoice, WholeReasoning, WholeText, logprobs_json
from gateway.api.chat import ChatWriter
from gateway.output.events import (
    AnswerEvent,
    ChoiceEnd,
    End,
    Reasoning,
    Text,
    TextLogprobs,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
)
from opticnerve.errors import EngineFailure
from opticnerve.generation.values import Usage

LOGPROB = TextLogprobs(TokenLogprob("é".encode(), -0.5), (TokenLogprob(b"e", -1.0),))


def read(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    body: dict[str, Any] = json.loads(event[6:])
    return body


async def made(*events: AnswerEvent) -> AsyncGenerator[AnswerEvent, None]:
    for event in events:
        yield event


def whole(writer: ChatWriter, *events: AnswerEvent) -> dict[str, Any]:
    first, *others = events
    body = asyncio.run(writer.body(first, made(*others), lambda _: None, 10**6))
    read: dict[str, Any] = json.loads(body)
    return read


def stream(writer: ChatWriter, *events: AnswerEvent) -> list[bytes]:
    """Every SSE event of a stream, and its end."""

    async def run() -> bytes:
        first, *others = events
        return b"".join([data async for data in writer.chunks(first, made(*others))])

    parts = asyncio.run(run()).split(b"\n\n")
    assert parts.pop() == b""
    return [part + b"\n\n" for part in parts]


def test_a_whole_answer() -> None:
    writer = ChatWriter("model", timings=True)
    writer.system_fingerprint, writer.logprobs = "fp_1", True
    body = whole(
        writer,
        Text(0, "A ", (LOGPROB, LOGPROB)),
        Text(1, ""),
        Text(0, "cat.", (LOGPROB,)),
        ChoiceEnd(1, "length"),
        ChoiceEnd(0, "stop", "###"),
        End(Usage(20, 5, 16, 9), {"encode_ms": 1.5}),
    )
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert parsed.choices[0].message.content == "A cat."
    assert parsed.choices[0].message.role == "assistant"
    assert parsed.choices[1].finish_reason == "length"
    assert parsed.choices[1].message.content == ""
    assert parsed.choices[0].logprobs is not None
    assert parsed.choices[0].logprobs.content is not None
    assert len(parsed.choices[0].logprobs.content) == 3
    silent = whole(ChatWriter("model"), ChoiceEnd(0, "length"), End(Usage(20, 5), {}))
    assert ChatCompletion.model_validate(silent, strict=True).choices[0].logprobs is None
    assert parsed.choices[0].logprobs.content[0].bytes == [0xC3, 0xA9]
    assert parsed.choices[0].logprobs.content[0].top_logprobs[0].token == "e"
    assert parsed.usage is not None and parsed.usage.total_tokens == 25
    assert parsed.usage.prompt_tokens_details is not None
    assert parsed.usage.prompt_tokens_details.cached_tokens == 16
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == 9
    assert body["choices"][0]["stop_reason"] == "###"
    assert body["timings"] == {"encode_ms": 1.5}
    assert body["system_fingerprint"] == "fp_1"


def test_an_empty_answer_has_log_probabilities_where_they_were_asked_for() -> None:
    events = (ChoiceEnd(0, "stop"), End(Usage(3, 1), {}))
    for logprobs, found in ((True, {"content": [], "refusal": None}), (False, None)):
        writer = ChatWriter("model")
        writer.logprobs = logprobs
        (choice,) = whole(writer, *events)["choices"]
        assert (choice["logprobs"], choice["message"]["content"]) == (found, "")


def test_bytes_are_counted_once() -> None:
    held: list[int] = []
    events = (Text(0, "ab", (LOGPROB,)), Text(0, "c", ()), ChoiceEnd(0, "stop"))
    writer = ChatWriter("model")
    writer.logprobs = True
    first, *others = (*events, End(Usage(1, 1), {}))
    body = asyncio.run(writer.body(first, made(*others), held.append, 10**6))
    (piece,) = json.loads(body)["choices"][0]["logprobs"]["content"]
    assert held == [2 + len(sse.dumps(piece)), 1, 0]


def test_parts_of_a_whole_answer_are_in_the_order_of_the_model() -> None:
    choice = WholeChoice(True)
    for event in (
        Reasoning(0, "Hm", (LOGPROB,)),
        Reasoning(0, "m."),
        Text(0, "I "),
        Text(0, "look.", (LOGPROB, LOGPROB)),
        ToolCallStart(0, 0, "call_1", "look"),
        ToolCallArguments(0, 0, '{"at"'),
        ToolCallArguments(0, 0, ":1}"),
        ToolCallStart(0, 1, "call_2", "see"),
        Text(0, "So."),
        ChoiceEnd(0, "tool_calls"),
    ):
        choice.add(event)
    assert [(type(part), part.text) for part in choice.parts] == [
        (WholeReasoning, "Hmm."),
        (WholeText, "I look."),
        (WholeCall, '{"at":1}'),
        (WholeCall, ""),
        (WholeText, "So."),
    ]
    assert "".join(choice.texts) == "I look.So." and "".join(choice.reasoning) == "Hmm."
    assert [(call.call_id, call.name) for call in choice.calls] == [
        ("call_1", "look"),
        ("call_2", "see"),
    ]
    assert choice.logprobs is not None and len(choice.logprobs) == 3
    assert choice.end is not None and choice.end.finish_reason == "tool_calls"


def test_a_stream() -> None:
    text = "A\n\ncat é 🤗"
    events = (Text(0, text, (LOGPROB,)), ChoiceEnd(0, "stop"), End(Usage(3, 2), {}))
    *parts, done = stream(ChatWriter("model", usage=True), *events)
    assert done == sse.DONE
    chunks = [ChatCompletionChunk.model_validate(read(part), strict=True) for part in parts]
    assert len({(c.id, c.created) for c in chunks}) == 1
    assert {(c.model, c.object) for c in chunks} == {("model", "chat.completion.chunk")}
    assert chunks[0].choices[0].delta.role == "assistant"
    shown = ""
    for chunk in chunks[:-1]:
        shown += chunk.choices[0].delta.content  # type: ignore[operator] # Never None.
    assert shown == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 5


def test_usage_is_null_until_the_end_where_it_was_asked_for() -> None:
    events = (Text(0, "x"), ChoiceEnd(0, "stop"), End(Usage(3, 2), {}))
    *asked, _, _ = stream(ChatWriter("m", usage=True), *events)
    assert [read(part)["usage"] for part in asked] == [None] * 3
    *silent, _ = stream(ChatWriter("m"), *events)
    assert len(silent) == 3 and not any("usage" in read(part) for part in silent)


def test_a_failure_after_the_stream_began() -> None:
    told = sse.failure(EngineFailure("the step failed"))
    assert told.endswith(sse.DONE)
    body = read(told.removesuffix(sse.DONE))
    assert body["error"]["message"] == "the step failed"
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_what_json_cannot_hold() -> None:
    assert json.loads(sse.dumps({"a": "\ud800x"})) == {"a": "?x"}
    (content,) = (logprobs_json([TextLogprobs(TokenLogprob(b"x", float("-inf")))]) or {})["content"]
    assert content["logprob"] == -9999.0


def test_no_line_break_of_any_kind_within_an_event() -> None:
    text = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\r\n\u00e9"
    events = (Text(0, text), ChoiceEnd(0, "stop"), End(Usage(1, 1), {}))
    _, event, *_ = stream(ChatWriter("m"), *events)
    assert len(event.decode().splitlines()) == 2
    assert read(event)["choices"][0]["delta"]["content"] == text
    assert "\u00e9" in event.decode()


def test_the_end() -> None:
    assert sse.DONE == b"data: [DONE]\n\n"
