"""Responses, whole and streamed, read back by the types of OpenAI's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.api.responses.request import ResponsesRequest
from gateway.api.responses.response import repeated
from gateway.api.responses.writer import ResponsesWriter
from gateway.api.schemas.parsing import parse
from gateway.api.sse import dumps
from gateway.clock import Deadline
from gateway.edge.admission import Admission
from gateway.edge.auth import ANONYMOUS
from gateway.job import Job
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
from opticnerve.errors import AnswerTooLarge, EngineFailure, InvalidRequest, Overloaded
from opticnerve.generation.values import Sampling, Usage

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
LOGPROB = TextLogprobs(TokenLogprob("é".encode(), -0.5), (TokenLogprob(b"e", -1.0),))
END = End(Usage(20, 5, 16, 9), {"total_ms": 2.5}, 3)
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
TOOL = {
    "type": "function", "name": "look", "description": "Looks.",
    "parameters": {"type": "object", "properties": {}}, "strict": True,
}  # fmt: skip
SAID = [
    Reasoning(0, "I should look."),
    Text(0, "I look.\n\n"),
    ToolCallStart(0, 0, "call_1", "look"),
    ToolCallArguments(0, 0, '{"at":"é"}'),
    ToolCallStart(0, 1, "call_2", "look"),
    Text(0, "Then I say 🤗."),
]
TURN: list[AnswerEvent] = [*SAID, ChoiceEnd(0, "tool_calls"), END]


def writer(max_bytes: int = 10**6, **fields: Any) -> ResponsesWriter:
    """The writer of a request's answer, as it begins."""
    body, _ = parse(ResponsesRequest, {"model": "model", "input": "Hi", **fields})
    made = ResponsesWriter(
        body.model,
        dumps(repeated(body, Sampling(temperature=0.7))),
        summary=body.wants_summary,
        timings=body.timings,
        max_bytes=max_bytes,
    )
    deadline, admission = Deadline.after(60), Admission(5, 10**9)
    with admission.arrive("me") as ticket:
        made.begin(Job(None, body.options, "req", ANONYMOUS, deadline, ticket))
    return made


async def _after(events: Sequence[AnswerEvent]) -> AsyncGenerator[AnswerEvent, None]:
    for event in events[1:]:
        yield event


def whole(events: Sequence[AnswerEvent], **fields: Any) -> dict[str, Any]:
    made = writer(**fields).body(events[0], _after(events), lambda _: None, 10**6)
    answer: dict[str, Any] = json.loads(asyncio.run(made))
    return answer


def stream(events: Sequence[AnswerEvent], **fields: Any) -> list[dict[str, Any]]:
    """The data of every event. Checks the names and numbers of them."""

    async def run() -> bytes:
        pieces = writer(**fields).chunks(events[0], _after(events))
        return b"".join([piece async for piece in pieces])

    return read(asyncio.run(run()))


def read(data: bytes) -> list[dict[str, Any]]:
    *blocks, rest = data.decode().split("\n\n")
    assert rest == ""
    told = []
    for number, block in enumerate(blocks):
        name, line = block.split("\n")
        event = json.loads(line.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", number)
        told.append(event)
    return told


def anonymous(value: Any) -> Any:
    """``value`` without ids and times, which differ between answers."""
    if isinstance(value, dict):
        made = {"id", "item_id", "created_at", "completed_at"}
        return {name: anonymous(held) for name, held in value.items() if name not in made}
    return [anonymous(held) for held in value] if isinstance(value, list) else value


# ---- whole


def test_a_whole_response() -> None:
    body = whole(TURN, tools=[TOOL], instructions="Be brief.", metadata={"a": "b"}, timings=True)
    response = Response.model_validate(body, strict=True)
    assert response.id.startswith("resp_") and response.object == "response"
    assert (response.status, response.error, response.incomplete_details) == (
        "completed", None, None
    )  # fmt: skip
    thought, said, call, second, last = response.output
    assert thought.type == "reasoning" and thought.id.startswith("rs_")
    assert thought.content is not None and thought.content[0].text == "I should look."
    assert thought.summary == []
    assert said.type == "message" and said.id.startswith("msg_") and said.role == "assistant"
    assert call.type == "function_call" and call.id is not None and call.id.startswith("fc_")
    assert (call.call_id, call.name, call.arguments) == ("call_1", "look", '{"at":"é"}')
    assert second.type == "function_call" and second.arguments == ""
    assert last.type == "message" and last.content[0].type == "output_text"
    assert {item.status for item in response.output} == {"completed"}
    assert response.output_text == "I look.\n\nThen I say 🤗."
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (20, 5, 25)
    assert usage.input_tokens_details.cached_tokens == 16
    assert usage.output_tokens_details.reasoning_tokens == 3
    assert body["usage"]["input_tokens_details"]["image_tokens"] == 9
    assert body["timings"] == {"total_ms": 2.5}


def test_a_response_repeats_its_request() -> None:
    form = {
        "type": "json_schema", "name": "a", "description": None, "strict": True,
        "schema": {"type": "object", "properties": {"a": {"const": None}}},
    }  # fmt: skip
    fields = {
        "instructions": "Be brief.",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "look"},
        "parallel_tool_calls": False,
        "text": {"format": form},
        "reasoning": {"effort": "low", "summary": "auto"},
        "metadata": {"a": "b"},
        "top_p": 0.5,
        "max_output_tokens": 9,
        "user": "u",
    }
    body = whole([ChoiceEnd(0, "stop"), END], **fields)
    assert {name: body[name] for name in fields} == {
        **fields, "text": {"format": form, "verbosity": "medium"}
    }  # fmt: skip
    assert (body["temperature"], body["store"], body["truncation"]) == (0.7, False, "disabled")
    plain = whole([ChoiceEnd(0, "stop"), END])
    assert (plain["tools"], plain["tool_choice"], plain["metadata"]) == ([], "auto", {})
    assert plain["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    Response.model_validate(plain, strict=True)


def test_a_response_that_was_cut_off() -> None:
    body = whole([Reasoning(0, "Hm."), Text(0, "A c"), ChoiceEnd(0, "length"), END])
    response = Response.model_validate(body, strict=True)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output] == ["completed", "incomplete"]
    assert body["completed_at"] is None


def test_a_call_whose_arguments_cannot_be_read_is_incomplete() -> None:
    call = [ToolCallStart(0, 0, "call_1", "look"), ToolCallArguments(0, 0, '{"at": 1, ')]
    body = whole([*call, Text(0, "oops}"), ChoiceEnd(0, "stop"), END])
    assert [item["status"] for item in body["output"]] == ["incomplete", "completed"]
    assert body["status"] == "completed"


def test_an_answer_without_output_is_an_empty_message() -> None:
    (message,) = whole([Text(0, ""), ChoiceEnd(0, "stop"), END])["output"]
    assert message["content"] == [
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    ]


def test_reasoning_may_take_the_place_of_its_summary() -> None:
    (item, _) = whole(TURN[:2] + TURN[-2:], reasoning={"summary": "detailed"})["output"]
    assert item["summary"] == [{"type": "summary_text", "text": "I should look."}]
    assert item["content"] == []


def test_log_probabilities_are_those_of_the_texts_tokens() -> None:
    events = [
        Reasoning(0, "Hm", (LOGPROB,)),
        Text(0, "", (LOGPROB,)),
        Text(0, "é", (LOGPROB,)),
        ChoiceEnd(0, "stop"),
        END,
    ]
    body = whole(events, **LOGPROBS)
    (text,) = body["output"][1]["content"]
    assert len(text["logprobs"]) == 2
    assert text["logprobs"][0]["top_logprobs"][0]["token"] == "e"
    Response.model_validate(body, strict=True)
    deltas = [event for event in stream(events, **LOGPROBS) if "delta" in event]
    assert [event.get("logprobs") for event in deltas] == [None, text["logprobs"]]


# ---- streamed


NAMES = """\
response.created
response.in_progress
response.output_item.added
response.content_part.added
response.reasoning_text.delta
response.reasoning_text.done
response.content_part.done
response.output_item.done
response.output_item.added
response.content_part.added
response.output_text.delta
response.output_text.done
response.content_part.done
response.output_item.done
response.output_item.added
response.function_call_arguments.delta
response.function_call_arguments.done
response.output_item.done
response.output_item.added
response.function_call_arguments.done
response.output_item.done
response.output_item.added
response.content_part.added
response.output_text.delta
response.output_text.done
response.content_part.done
response.output_item.done
response.completed
"""


def test_the_events_of_a_stream_in_order() -> None:
    told = stream(TURN, tools=[TOOL])
    assert [event["type"] for event in told] == NAMES.split()
    for event in told:
        EVENT.validate_python(event, strict=True)
    assert told[-1]["response"]["output"] == [
        event["item"] for event in told if event["type"] == "response.output_item.done"
    ]
    assert told[0]["response"]["status"] == "in_progress" and told[0]["response"]["usage"] is None
    assert anonymous(told[-1]["response"]) == anonymous(whole(TURN, tools=[TOOL]))


def test_a_summary_has_events_of_its_own() -> None:
    told = stream(TURN[:1] + TURN[-2:], reasoning={"summary": "auto"})
    assert [event["type"] for event in told[3:8]] == [
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
    ]
    for event in told:
        EVENT.validate_python(event, strict=True)


def test_a_stream_that_was_cut_off() -> None:
    told = stream([Text(0, "A c"), ChoiceEnd(0, "length"), END])
    assert told[-2]["item"]["status"] == told[-1]["response"]["status"] == "incomplete"
    assert told[-1]["type"] == "response.incomplete"
    EVENT.validate_python(told[-1], strict=True)


@st.composite
def splits(draw: st.DrawFn) -> list[AnswerEvent]:
    """The events of TURN, with their texts cut into pieces."""
    events: list[AnswerEvent] = []
    for event in SAID:
        if isinstance(event, ToolCallStart):
            events.append(event)
            continue
        cuts = sorted(draw(st.lists(st.integers(0, len(event.text)), max_size=4)))
        for start, end in zip([0, *cuts], [*cuts, len(event.text)], strict=True):
            piece = event.text[start:end]
            if isinstance(event, ToolCallArguments):
                events.append(ToolCallArguments(0, event.index, piece))
            else:
                events.append(type(event)(0, piece))
    return [*events, *TURN[-2:]]


@settings(deadline=None, max_examples=50)
@given(splits())
def test_every_split_of_the_text_gives_the_same_response(events: list[AnswerEvent]) -> None:
    told = stream(events, tools=[TOOL])
    assert anonymous(told[-1]["response"]) == anonymous(whole(TURN, tools=[TOOL]))
    texts: dict[int, str] = {}
    for event in told:
        if "delta" in event:
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
    assert [texts.get(i, "") for i in range(5)] == [
        "I should look.", "I look.\n\n", '{"at":"é"}', "", "Then I say 🤗."
    ]  # fmt: skip


def test_openais_client_reassembles_a_stream() -> None:
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    for event in stream(TURN, tools=[TOOL]):
        state.handle_event(EVENT.validate_python(event))
    final = state._completed_response
    assert final.output_text == "I look.\n\nThen I say 🤗."
    assert [item.type for item in final.output] == [
        "reasoning", "message", "function_call", "function_call", "message"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineFailure("the step failed"), "server_error"),
        (Overloaded("too many"), "rate_limit_exceeded"),
        (InvalidRequest("bad"), "invalid_prompt"),
    ],
)
def test_a_failure_in_the_middle(error: Any, code: str) -> None:
    made = writer()

    async def run() -> bytes:
        pieces = made.chunks(TURN[1], _after(TURN[1:3]))
        data = b""
        with pytest.raises(RuntimeError):  # The events end without an End.
            async for piece in pieces:
                data += piece
        return data + made.failure(error)

    told = read(asyncio.run(run()))
    failed, failure = told[-1], told[-2]
    assert (failure["type"], failure["message"]) == ("error", error.message)
    assert failure["error"] == error.to_openai()["error"]
    EVENT.validate_python(failure, strict=True)
    assert failed["response"]["error"] == {"code": code, "message": error.message}
    assert failed["response"]["status"] == "failed"
    assert [item["type"] for item in failed["response"]["output"]] == ["message"]
    EVENT.validate_python(failed, strict=True)


def test_a_stream_holds_no_more_than_a_whole_answer() -> None:
    with pytest.raises(AnswerTooLarge):
        stream([Text(0, "x" * 600)] * 2 + TURN[-2:], max_bytes=1000)


def _events(texts: Iterable[str]) -> list[AnswerEvent]:
    return [*(Text(0, text) for text in texts), ChoiceEnd(0, "stop"), END]


def test_no_line_break_within_an_event() -> None:
    text = "a\x85b\u2028c\u2029d\x0b\r\n"
    told = stream(_events([text]), instructions=text)
    assert told[-1]["response"]["output"][0]["content"][0]["text"] == text
    assert told[-1]["response"]["instructions"] == text
