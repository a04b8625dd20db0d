"""Anthropic's Messages API: from a body to a prompt and options, and from events to messages."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from gateway.api.anthropic.errors import is_anthropic, to_anthropic
from gateway.api.anthropic.prompt import chat_prompt, read_prompt
from gateway.api.anthropic.request import CountTokensRequest, MessagesRequest
from gateway.api.anthropic.writer import SIGNATURE, AnthropicWriter
from gateway.api.schemas.messages import SWITCHED_THINKING
from gateway.api.schemas.parsing import parse
from gateway.job import CallMode, ChatPrompt, FormatKind, OutputFormat, Tool, ToolUse
from gateway.output.events import (
    AnswerEvent,
    ChoiceEnd,
    End,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from opticnerve.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidMedia,
    InvalidRequest,
    NotFound,
    OpticNerveError,
    Overloaded,
    PayloadTooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedFeature,
)
from opticnerve.generation.values import Usage

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Now.", "input_schema": SCHEMA}
DATA = "iVBORw0KGgo="
BASE64 = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
URL = {"type": "image", "source": {"type": "url", "url": "https://example.com/cat.png"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def turn(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": blocks[0] if isinstance(blocks[0], str) else list(blocks)}


def request(*turns: dict[str, Any], **fields: Any) -> MessagesRequest:
    messages = list(turns) or [turn("user", "Hello")]
    return parse(MessagesRequest, {"model": "m", "max_tokens": 9, "messages": messages, **fields})[
        0
    ]


def prompt(*turns: dict[str, Any], **fields: Any) -> ChatPrompt:
    return chat_prompt(request(*turns, **fields))


def roles(found: ChatPrompt) -> list[tuple[str, Any]]:
    return [(message.role, message.content) for message in found.messages]


# ---- prompts


def test_a_string_is_one_block_of_text() -> None:
    for content in ("Hi", [text("Hi")]):
        found = prompt({"role": "user", "content": content}, system="Be brief.")
        assert roles(found) == [("system", "Be brief."), ("user", "Hi")]
        assert found.add_generation_prompt and not found.continue_final_message


def test_pictures_stand_in_order_with_their_paths() -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("See"), URL]}
    found = prompt(
        turn("user", BASE64, text("What?")),
        turn("assistant", text("Look."), CALL),
        turn("user", result, URL, text("And?")),
    )
    assert [(source.url, source.param) for source in found.sources] == [
        ("data:;base64," + DATA, "messages[0].content[0].source.data"),
        ("https://example.com/cat.png", "messages[2].content[0].content[1].source.url"),
        ("https://example.com/cat.png", "messages[2].content[1].source.url"),
    ]
    kinds = [[part.type for part in content] for _, content in roles(found) if content != "Look."]
    assert kinds == [["image", "text"], ["text", "image"], ["image", "text"]]
    assert [role for role, _ in roles(found)] == ["user", "assistant", "tool", "user"]
    assert found.size > 8_000


def test_turns_of_one_role_are_one_message() -> None:
    found = prompt(
        turn("user", "a"), turn("user", text("b")), turn("assistant", "c"), turn("user", "d")
    )
    assert [role for role, _ in roles(found)] == ["user", "assistant", "user"]
    first = found.messages[0].content
    assert isinstance(first, list) and [part.text for part in first] == ["a", "b"]  # type: ignore[union-attr]


def test_calls_results_and_thinking() -> None:
    thought = {"type": "thinking", "thinking": "Rome?", "signature": "x"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    bad = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no", "is_error": True}
    picture = {"type": "tool_result", "tool_use_id": "other", "content": [URL], "is_error": True}
    empty = {"type": "tool_result", "tool_use_id": "toolu_1"}
    found = prompt(
        turn("user", "Weather?"),
        turn("assistant", thought, redacted, CALL),
        turn("user", bad, picture, empty),
    )
    _, called, *results = found.messages
    assert called.content is None and called.reasoning_content == "Rome?"
    assert called.tool_calls is not None
    (call,) = called.tool_calls
    assert (call.id, call.function.name) == ("toolu_1", "weather")
    assert call.function.arguments == {"city": "Rome"}
    assert [(each.name, each.tool_call_id) for each in results] == [
        ("weather", "toolu_1"),
        (None, "other"),
        ("weather", "toolu_1"),
    ]
    told, seen, nothing = (each.content for each in results)
    assert told == "Error: no" and nothing == ""
    assert isinstance(seen, list) and [part.type for part in seen] == ["text", "image"]


def test_the_assistants_last_turn_is_continued() -> None:
    found = prompt(turn("user", "Say"), turn("assistant", "The best"))
    assert found.continue_final_message and not found.add_generation_prompt
    for last in ([], "", [text("")], [CALL, text("x")], [text("x"), CALL]):
        with pytest.raises(InvalidRequest, match="end with text") as caught:
            prompt(turn("user", "Say"), {"role": "assistant", "content": last})
        assert caught.value.param == "messages[1].content"


def test_thinking_and_effort_are_variables_of_the_template() -> None:
    assert prompt().chat_template_kwargs is None
    for kind, on in (("enabled", True), ("adaptive", True), ("disabled", False)):
        found = prompt(thinking={"type": kind}, output_config={"effort": "low"})
        assert found.chat_template_kwargs == {"enable_thinking": on, "thinking": on}
        assert found.reasoning_effort == "low"


def test_many_blocks_are_read_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    monkeypatch.setattr(
        "gateway.api.anthropic.prompt.chat_prompt",
        lambda body: threads.append(threading.current_thread() is threading.main_thread()),
    )
    many = {"type": "tool_result", "tool_use_id": "a", "content": [text("x")] * 200}
    for body in (request(), request(turn("user", many))):
        asyncio.run(read_prompt(body))
    assert threads == [True, False]


# ---- options


def test_options() -> None:
    options = request(
        stop_sequences=["x"], temperature=0.5, top_p=0.9, top_k=3, stream=True
    ).options
    sampling = options.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 3)
    assert sampling.stop_strings == ("x",) and options.max_tokens == 9 and options.running_usage
    assert options.tools is None and options.format is None and sampling.n is None
    for display in (None, "summarized", "omitted"):
        thinking = {"type": "enabled", "display": display}
        assert request(thinking=thinking).options.reasoning == (display != "omitted")


@pytest.mark.parametrize(
    ("choice", "mode", "name", "parallel"),
    [
        (None, CallMode.AUTO, "", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, CallMode.AUTO, "", False),
        ({"type": "any"}, CallMode.REQUIRED, "", True),
        ({"type": "tool", "name": "weather"}, CallMode.NAMED, "weather", True),
    ],
)
def test_tools(choice: Any, mode: CallMode, name: str, parallel: bool) -> None:
    body = request(tools=[{**TOOL, "strict": True, "cache_control": {}}], tool_choice=choice)
    tool = Tool("weather", "Now.", SCHEMA, True)
    assert body.options.tools == ToolUse((tool,), mode, name, parallel)
    assert chat_prompt(body).tools == (tool,)
    none = request(tools=[TOOL], tool_choice={"type": "none"})
    assert none.options.tools is None and chat_prompt(none).tools == ()


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_formats(field: str) -> None:
    value = {"type": "json_schema", "schema": SCHEMA}
    path = field if field == "output_format" else "output_config.format"
    fields = {field: value if field == "output_format" else {"format": value}}
    found = request(**fields).options.format
    assert found == OutputFormat(FormatKind.JSON_SCHEMA, SCHEMA, f"{path}.schema")


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"max_tokens": None}, "max_tokens", "integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": [turn("tool", "x")]}, "messages[0].role", "'user', 'assistant' or 'system'"),
        ({"messages": [turn("user", {"type": "document"})]}, "messages[0].content[0]", "its text"),
        (
            {"messages": [turn("user", {"type": "web_search_tool_result"})]},
            "messages[0].content[0]",
            "runs no tools itself",
        ),
        ({"messages": [turn("user", {"type": "odd"})]}, "messages[0].content[0]", "the type text"),
        ({"messages": [turn("user", {})]}, "messages[0].content[0]", "the type text"),
        ({"messages": [turn("user", CALL)]}, "messages[0].content", "assistant's"),
        ({"messages": [turn("assistant", URL)]}, "messages[0].content", "user's"),
        (
            {"messages": [turn("user", {"type": "image", "source": {"type": "file"}})]},
            "messages[0].content[0].source",
            "base64, or its url",
        ),
        (
            {"messages": [turn("user", {"type": "image", "source": {"type": "base64"}})]},
            "messages[0].content[0].source.data",
            "required",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]", "type bash_20250124"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "required"),
        ({"tools": [TOOL, TOOL]}, "tools", "of one name"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name", "pattern"),
        ({"tools": [{**TOOL, "input_schema": {"type": "array"}}]}, "tools[0].input_schema", "obj"),
        ({"tools": [{**TOOL, "description": "x" * 2**18}]}, "tools", "at most"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name", "required"),
        (
            {"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]},
            "tool_choice",
            "among tools",
        ),
        ({"thinking": {"type": "on"}}, "thinking.type", "'enabled'"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema", "required"),
        (
            {"output_format": {"type": "json_schema", "schema": {"title": "x" * 2**18}}},
            "output_format.schema",
            "at most",
        ),
        ({"temprature": 1}, "temprature", "did you mean temperature"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        request(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [turn("user", {"type": "document"})]},
        {"messages": [turn("user", {"type": "web_search_tool_result"})]},
        {"messages": [turn("user", {"type": "image", "source": {"type": "file"}})]},
        {"tools": [{"type": "bash_20250124", "name": "bash"}]},
    ],
)
def test_what_is_unsupported_has_the_code_of_it(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        request(**fields)
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize("field", ["container", "mcp_servers", "thread"])
def test_what_needs_anthropics_servers_is_refused(field: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        request(**{field: [{"x": 1}]})
    assert caught.value.param == field
    request(**{field: None})


def test_what_has_no_effect_is_named() -> None:
    fields: dict[str, Any] = {
        "metadata": {"user_id": "u"}, "service_tier": "auto", "speed": "fast",
        "cache_control": {"type": "ephemeral"}, "context_management": {"edits": []},
        "thinking": {"type": "enabled", "budget_tokens": 2048}, "diagnostics": {}, "top_k": None,
        "system": [{**text("Be."), "cache_control": {"type": "ephemeral"}, "citations": None}],
    }  # fmt: skip
    messages = [turn("user", {**URL, "transformations": {}})]
    _, ignored = parse(
        MessagesRequest, {"model": "m", "max_tokens": 1, "messages": messages, **fields}
    )
    assert ignored.unknown == ("messages[0].content[0].transformations",)
    assert set(ignored.without_effect) == {
        "speed", "context_management", "thinking.budget_tokens", "diagnostics", SWITCHED_THINKING
    }  # fmt: skip


def test_tokens_are_counted_for_a_prompt_alone() -> None:
    parse(CountTokensRequest, {"model": "m", "messages": [turn("user", "x")], "tools": [TOOL]})
    with pytest.raises(InvalidRequest, match="unknown field"):
        parse(CountTokensRequest, {"model": "m", "messages": [turn("user", "x")], "max_tokens": 1})


# ---- answers


def end(reason: Any, stop: str | int | None = None) -> tuple[ChoiceEnd, End]:
    return ChoiceEnd(0, reason, stop), End(Usage(10, 5, 4), {"total_ms": 1}, 2)


async def made(events: Any) -> AsyncGenerator[AnswerEvent, None]:
    for event in events:
        yield event


def whole(*events: AnswerEvent, **settings: Any) -> dict[str, Any]:
    writer = AnthropicWriter("m", settings.pop("most", 5), **settings)
    first, *others = events
    body = asyncio.run(writer.body(first, made(others), lambda _: None, 10**6))
    read: dict[str, Any] = json.loads(body)
    return read


def stream(*events: AnswerEvent, **settings: Any) -> list[dict[str, Any]]:
    async def run() -> bytes:
        writer, (first, *others) = AnthropicWriter("m", settings.pop("most", 5), **settings), events
        return b"".join([data async for data in writer.chunks(first, made(others))])

    return list(_events(asyncio.run(run())))


def _events(data: bytes) -> Iterator[dict[str, Any]]:
    for block in data.decode().removesuffix("\n\n").split("\n\n"):
        name, body = block.split("\n")
        read = json.loads(body.removeprefix("data: "))
        assert name == f"event: {read['type']}"
        yield read


def assembled(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream; the order of its events is checked."""
    start, *within, delta, stop = events
    assert (start["type"], delta["type"], stop["type"]) == (
        "message_start", "message_delta", "message_stop"
    )  # fmt: skip
    message: dict[str, Any] = start["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    parts: dict[int, str] = {}
    is_open = False
    for event in within:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert not is_open and index == len(message["content"])
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert is_open and index == len(message["content"]) - 1
            block, given = message["content"][index], event["delta"]
            kind = given["type"].removesuffix("_delta")
            if kind == "input_json":
                parts[index] = parts.get(index, "") + given["partial_json"]
            else:
                block[kind] += given[kind]
        is_open = event["type"] != "content_block_stop"
    assert not is_open
    for index, written in parts.items():
        message["content"][index]["input"] = from_json(written, allow_partial=True)
    return {**message, **delta["delta"], "usage": delta["usage"]}


CALLS: tuple[AnswerEvent, ...] = (
    Reasoning(0, "It "),
    Reasoning(0, "rains?"),
    Text(0, "\n"),
    Text(0, "\nLet me"),
    Text(0, " see."),
    ToolCallStart(0, 0, "call_1", "weather"),
    ToolCallArguments(0, 0, '{"city": "Ro'),
    ToolCallArguments(0, 0, 'me"}'),
    Text(0, "\n"),
    ToolCallStart(0, 1, "abcdefghi", "time"),
    *end("tool_calls"),
)


def test_a_stream_is_the_whole_answer_in_pieces() -> None:
    parted = (Reasoning(0, "a"), Text(0, " "), Reasoning(0, "b"), Text(0, "\n"), Text(0, "c"))
    for events in (
        CALLS,
        (Text(0, "Hi"), *end("stop")),
        (Text(0, " "), *end("length")),
        (*parted, *end("stop")),
    ):
        told, streamed = whole(*events), assembled(stream(*events))
        assert {**told, "id": ""} == {**streamed, "id": ""}


PIECES = st.sampled_from(["", " ", "\n", "a", " b ", "c"])
CALLED = st.sampled_from(["", "{}", '{"city": "Ro', '{"city": "Rome", "days": [1, 2]}'])


@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.builds(Text, st.just(0), PIECES),
            st.builds(Reasoning, st.just(0), PIECES),
            st.lists(CALLED, max_size=1),
        ),
        max_size=8,
    )
)
def test_any_stream_is_the_whole_answer_in_pieces(drawn: list[Any]) -> None:
    events: list[AnswerEvent] = []
    for index, each in enumerate(drawn):
        if isinstance(each, list):  # A call, its arguments in pieces of three characters.
            written = "".join(each)
            events.append(ToolCallStart(0, index, f"call_{index}", "weather"))
            pieces = [written[at : at + 3] for at in range(0, len(written), 3)]
            events += [ToolCallArguments(0, index, piece) for piece in pieces]
        else:
            events.append(each)
    events += end("stop")
    assert {**whole(*events), "id": ""} == {**assembled(stream(*events)), "id": ""}


def test_a_message_with_thinking_text_and_calls() -> None:
    told = whole(*CALLS)
    thinking, said, *calls = told["content"]
    assert thinking == {"type": "thinking", "thinking": "It rains?", "signature": SIGNATURE}
    assert said["type"] == "text" and said["text"].strip() == "Let me see."
    assert calls == [
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
        {"type": "tool_use", "id": "abcdefghi", "name": "time", "input": {}},
    ]
    assert told["stop_reason"] == "tool_use" and told["id"].startswith("msg_")
    assert told["usage"] == {
        "input_tokens": 6,
        "output_tokens": 5,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "output_tokens_details": {"thinking_tokens": 2},
    }


@pytest.mark.parametrize(
    ("reason", "stop", "most", "told"),
    [
        ("stop", None, 5, "end_turn"),
        ("stop", 7, 5, "end_turn"),
        ("stop", "END", 5, "stop_sequence"),
        ("length", None, 5, "max_tokens"),
        ("length", None, 6, "model_context_window_exceeded"),
    ],
)
def test_why_it_stopped(reason: Any, stop: Any, most: int, told: str) -> None:
    events = (Text(0, "x"), *end(reason, stop))
    for message in (whole(*events, most=most), assembled(stream(*events, most=most))):
        assert message["stop_reason"] == told
        assert message["stop_sequence"] == (stop if told == "stop_sequence" else None)


@pytest.mark.parametrize(
    ("arguments", "reason", "told"),
    [("{}", "tool_calls", "tool_use"), ('{"a": 1, ', "stop", "end_turn")],
)
def test_a_call_that_cannot_be_read_is_no_use_of_a_tool(
    arguments: str, reason: Any, told: str
) -> None:
    events = (ToolCallStart(0, 0, "a", "b"), ToolCallArguments(0, 0, arguments), *end(reason))
    assert whole(*events)["stop_reason"] == assembled(stream(*events))["stop_reason"] == told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a": 1, "b": "cut', {"a": 1}),
        ("", {}),
        ('{"a": nope}', {"INVALID_JSON": '{"a": nope}'}),
        ("[1]", {"INVALID_JSON": "[1]"}),
    ],
)
def test_input_that_is_no_object_is_kept(arguments: str, told: Any) -> None:
    events = (ToolCallStart(0, 0, "a", "b"), ToolCallArguments(0, 0, arguments), *end("length"))
    assert whole(*events)["content"][0]["input"] == told


def test_usage_and_timings_of_a_stream() -> None:
    first = Text(0, "x", usage=Usage(10, 1, 4))
    start, *_, delta, _ = stream(first, *end("stop"), timings=True)
    assert start["message"]["usage"]["input_tokens"] == 6
    assert delta["usage"]["output_tokens"] == 5 and delta["timings"] == {"total_ms": 1}
    assert whole(first, *end("stop"), timings=True)["timings"] == {"total_ms": 1}


# ---- errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidMedia("x"), "invalid_request_error"),
        (Unauthenticated("x"), "authentication_error"),
        (Forbidden("x"), "permission_error"),
        (NotFound("x"), "not_found_error"),
        (PayloadTooLarge("x"), "request_too_large"),
        (Overloaded("x"), "rate_limit_error"),
        (OpticNerveError("x"), "api_error"),
        (Unavailable("x"), "overloaded_error"),
        (DeadlineExceeded("x"), "timeout_error"),
    ],
)
def test_errors_have_anthropics_types(error: OpticNerveError, kind: str) -> None:
    told = to_anthropic(error, "req-1")
    assert (told["type"], told["error"]["type"], told["request_id"]) == ("error", kind, "req-1")


def test_a_failed_stream_ends_with_an_event() -> None:
    (event,) = _events(AnthropicWriter("m", 5).failure(Unavailable("stopping", param="x")))
    assert event["error"]["details"] == {"error_code": "unavailable", "param": "x"}


def test_the_path_decides() -> None:
    assert all(map(is_anthropic, ("/v1/messages", "/v1/messages/batches", "/v1/v1/messages")))
    assert not any(map(is_anthropic, ("/v1/messages2", "/v1/chat/messages", "/")))
