"""What a request for a response may say, what is made of it, and what is said about one that may
not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import response_create_params

from gateway.api.responses.request import ResponsesRequest
from gateway.api.schemas.messages import ItemSource, Message, TextPart
from gateway.api.schemas.parsing import UNSUPPORTED, Ignored, parse
from gateway.job import CallMode, FormatKind, OutputFormat, Tool, ToolUse
from opticnerve.errors import InvalidRequest, UnsupportedFeature
from tests.bodies import DATA, URL

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
SEE = {"type": "function", "name": "see", "parameters": None, "strict": None}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "A cat."}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def asked(items: Any = "Hi", **fields: Any) -> tuple[ResponsesRequest, Ignored]:
    body = {"model": "model", "input": items, **fields}
    return parse(ResponsesRequest, json.dumps(body).encode())


def request(items: Any = "Hi", **fields: Any) -> ResponsesRequest:
    return asked(items, **fields)[0]


def messages(items: Any, **fields: Any) -> list[dict[str, Any]]:
    """The messages of a chat, without absent fields; a picture is its part's type."""
    return [_plain(message) for message in request(items, **fields).prompt.messages]


def _plain(message: Message) -> dict[str, Any]:
    plain = {name: value for name, value in vars(message).items() if value is not None}
    if isinstance(message.content, list):
        plain["content"] = [
            part.text if isinstance(part, TextPart) else part.type for part in message.content
        ]
    if message.tool_calls:
        plain["tool_calls"] = [
            (call.id, call.function.name, call.function.arguments) for call in message.tool_calls
        ]
    return plain


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(said: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": kind, "text": said}


def picture(**fields: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": URL, **fields}


# ---- items become messages


def test_a_string_is_a_users_message() -> None:
    assert messages("What?") == [{"role": "user", "content": "What?"}]
    assert messages("What?", instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?"},
    ]


@pytest.mark.parametrize("kind", [{}, {"type": "message"}, {"type": None}])
def test_messages_with_and_without_a_type(kind: dict[str, Any]) -> None:
    given = [
        {"role": "system", "content": "Be brief.", **kind},
        {"role": "developer", "content": [text("Briefer.")], **kind},
        {"role": "user", "content": [text("What?"), picture()], **kind},
        {"role": "assistant", "content": "A cat.", **kind},
    ]
    assert messages(given) == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": ["Briefer."]},
        {"role": "user", "content": ["What?", "image"]},
        {"role": "assistant", "content": "A cat."},
    ]


def test_an_answers_items_are_one_message() -> None:
    answer = [
        {"type": "reasoning", "id": "rs_1", "summary": [],
         "content": [text("Let me look.", "reasoning_text")], "status": None},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{**text("I look.", "output_text"), "annotations": [], "logprobs": []}]},
        {**CALL, "id": "fc_1", "status": "completed"},
        {**CALL, "call_id": "c2", "name": "see", "arguments": ""},
    ]  # fmt: skip
    result = [OUTPUT, {**OUTPUT, "call_id": "c2", "output": [text("Two."), picture()]}]
    last = {"role": "assistant", "content": "So."}
    assert messages([user(text("?")), *answer, *result, last]) == [
        {"role": "user", "content": ["?"]},
        {"role": "assistant", "content": ["I look."], "reasoning_content": "Let me look.",
         "tool_calls": [("c1", "look", '{"at": 1}'), ("c2", "see", "")]},
        {"role": "tool", "content": "A cat.", "tool_call_id": "c1", "name": "look"},
        {"role": "tool", "content": ["Two.", "image"], "tool_call_id": "c2", "name": "see"},
        {"role": "assistant", "content": "So."},
    ]  # fmt: skip


def test_what_follows_the_calls_or_the_text_of_a_message_is_another_message() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [text("Hm.", "summary_text")]}
    said = {"role": "assistant", "content": "So."}
    assert messages([thought, thought, CALL, said, said, thought, CALL]) == [
        {"role": "assistant", "reasoning_content": "Hm.\n\nHm.",
         "tool_calls": [("c1", "look", '{"at": 1}')]},
        {"role": "assistant", "content": "So."},
        {"role": "assistant", "content": "So."},
        {"role": "assistant", "reasoning_content": "Hm.",
         "tool_calls": [("c1", "look", '{"at": 1}')]},
    ]  # fmt: skip


def test_reasoning_that_only_another_server_can_read_is_left_out() -> None:
    hidden = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    assert messages([user(text("?")), hidden]) == [{"role": "user", "content": ["?"]}]


def test_a_call_that_was_cut_off_is_left_out() -> None:
    cut = {**CALL, "call_id": "c2", "arguments": '{"at": ', "status": "incomplete"}
    (asked, answered) = messages([user(text("?")), {**CALL, "status": "completed"}, cut])
    assert asked["role"] == "user"
    assert answered["tool_calls"] == [("c1", "look", '{"at": 1}')]


def test_an_earlier_refusal_is_text() -> None:
    (message,) = request(
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]
    ).prompt.messages
    assert isinstance(message.content, list) and message.content[0].type == "refusal"


def test_pictures_have_the_path_of_their_item() -> None:
    given = [
        user(text("?"), picture(detail="low"), picture(image_url=f" {DATA}", max_pixels=99)),
        CALL,
        {**OUTPUT, "output": [picture(min_pixels=7)]},
    ]
    asked = request(given, mm_processor_kwargs={"min_pixels": 5})
    assert asked.prompt.sources == (
        ItemSource(URL, "input[0].content[1].image_url", 5, None, True),
        ItemSource(DATA, "input[0].content[2].image_url", 5, 99),
        ItemSource(URL, "input[2].output[0].image_url", 7, None),
    )


# ---- settings


def test_settings() -> None:
    asked = request(
        max_output_tokens=9,
        temperature=0.5,
        top_k=3,
        seed=7,
        stop=["x"],
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        reasoning={"effort": "low", "summary": "auto"},
        chat_template_kwargs={"enable_thinking": False},
        metadata={"a": "b"},
    )
    options = asked.options
    assert (options.max_tokens, options.max_tokens_field) == (9, "max_output_tokens")
    assert (options.sampling.temperature, options.sampling.top_k) == (0.5, 3)
    assert options.sampling.stop_strings == ("x",) and options.top_logprobs == 2
    assert options.format is None and options.tools is None
    assert asked.prompt.reasoning_effort == "low" and asked.wants_summary
    assert asked.prompt.chat_template_kwargs == {"enable_thinking": False}
    plain = request().options
    assert plain.top_logprobs is None and plain.max_tokens is None


@pytest.mark.parametrize(
    ("form", "made"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, OutputFormat(FormatKind.JSON_OBJECT, None, "text.format")),
        (
            {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True},
            OutputFormat(FormatKind.JSON_SCHEMA, SCHEMA, "text.format.schema"),
        ),
        (
            {"type": "json_schema", "name": "a", "schema": SCHEMA},
            OutputFormat(FormatKind.JSON_SCHEMA, SCHEMA, "text.format.schema", strict=False),
        ),
    ],
)
def test_forms_of_the_text(form: dict[str, Any], made: OutputFormat | None) -> None:
    found, ignored = asked(text={"format": form, "verbosity": "low"})
    assert found.options.format == made
    assert ignored == Ignored((), ("text.verbosity",))


def test_functions() -> None:
    look = Tool("look", "", {"type": "object"}, True)
    see = Tool("see", "", {"type": "object", "properties": {}})
    both = (look, see)
    for choice, use in (
        (None, ToolUse(both)),
        ("auto", ToolUse(both)),
        ("none", None),
        ("required", ToolUse(both, CallMode.REQUIRED)),
        ({"type": "function", "name": "see"}, ToolUse(both, CallMode.NAMED, "see")),
        (
            {"type": "allowed_tools", "mode": "required",
             "tools": [{"type": "function", "name": "see"}]},
            ToolUse((see,), CallMode.REQUIRED),
        ),
    ):  # fmt: skip
        asked = request(tools=[LOOK, SEE], tool_choice=choice)
        assert asked.options.tools == use
        assert asked.prompt.tools == (both if use else ())
    single = request(tools=[SEE], parallel_tool_calls=False).options.tools
    assert single is not None and not single.parallel
    for nothing in (None, []):
        assert request(tools=nothing, tool_choice="auto").options.tools is None


# ---- what is refused, and how


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the earlier items"),
        ({"conversation": "conv_1"}, "conversation", "send the earlier items"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "send the earlier items"),
        ({"store": True}, "store", "send store: false"),
        ({"background": True}, "background", "stream"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"truncation": "auto"}, "truncation", "leave out the first items"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"messages": []}, "messages", "input"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"guided_regex": "a"}, "guided_regex", "text.format"),
        ({"return_token_ids": True, "stream": True}, "return_token_ids", "/v1/chat/completions"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "/v1/chat/completions"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", '"web_search"'),
        ({"tools": [SEE, {"type": "mcp", "server_label": "x"}]}, "tools[1].type", '"mcp"'),
        ({"tools": [SEE], "tool_choice": {"type": "file_search"}}, "tool_choice.type", "function"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "store = false"),
        ({"input": [{"id": "msg_1"}]}, "input[0].type", "send the item itself"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0].type", "runs no tools"),
        ({"input": [user({"type": "input_file", "file_id": "x"})]},
         "input[0].content[0].type", "pictures"),
        ({"input": [user(text("?"), text("?", "text"))]}, "input[0].content[1].type", "input_text"),
        ({"input": [user({"type": "input_image", "file_id": "file_1"})]},
         "input[0].content[0].file_id", "data: URL"),
        ({"input": [{**OUTPUT, "output": [{"type": "input_file"}]}]}, "input[0].output[0].type",
         "input_file"),
    ],
)  # fmt: skip
def test_what_is_not_supported(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        parse(ResponsesRequest, json.dumps({"model": "model", "input": "Hi", **fields}).encode())
    assert caught.value.param == param and caught.value.code == "unsupported"
    assert said in caught.value.message and "not supported" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": None}, "input", "string"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "nothing to answer"),
        ({"input": [{**CALL, "status": "done"}]}, "input[0].status", "'incomplete'"),
        ({"input": [{"content": "x"}]}, "input[0]", "should have the type message"),
        ({"input": [{"type": "massage"}]}, "input[0]", "should have the type message"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'user'"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "a string or a list"),
        ({"input": [user({"type": "video"})]}, "input[0].content[0]", "input_text, input_image"),
        ({"input": [user({"type": "input_image"})]}, "input[0].content[0].image_url", "required"),
        ({"input": [user(picture(image_url=" "))]}, "input[0].content[0].image_url", "empty"),
        ({"input": [user(picture(min_pixels=9, max_pixels=8))]}, "input[0].content[0]", "exceeds"),
        ({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments", "a JSON object"),
        ({"input": [CALL, {**CALL, "arguments": "[1]"}]}, "input[1].arguments", "a JSON object"),
        ({"input": [{**CALL, "arguments": json.dumps([0] * 70_000)}]}, "input", "65536 values"),
        ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments", "string"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "required"),
        ({"input": [{**OUTPUT, "output": None}]}, "input[0].output", "string"),
        ({"n": 2}, "n", "less than or equal to 1"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
        ({"include": ["everything"]}, "include[0]", "logprobs"),
        ({"metadata": {"a": 1}}, "metadata.a", "a string"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "at most 512"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tools": [{**SEE, "name": "a b"}]}, "tools[0].name", "pattern"),
        ({"tools": [SEE, SEE]}, "tools", "name"),
        ({"tool_choice": "required"}, "tool_choice", "needs"),
        ({"tools": [SEE], "tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tools": [SEE], "tool_choice": {"type": "function", "name": "look"}}, "tool_choice",
         "among tools"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema",
         "required"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": 5}}},
         "text.format.schema", "an object"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'high'"),
        ({"user": "x" * 1025}, "user", "at most 1024"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {},
                              "description": "x" * 140_000}}}, "text.format", "at most 131072"),
        ({"colour": 1}, "colour", "unknown field"),
    ],
)  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(ResponsesRequest, json.dumps({"model": "model", "input": "Hi", **fields}).encode())
    assert caught.value.http_status == 400 and len(caught.value.message) < 1000
    assert caught.value.param == param, caught.value.message
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"store": False, "background": False, "truncation": "disabled"}, Ignored()),
        ({"include": [], "tools": [], "tool_choice": "none", "stream": False}, Ignored()),
        ({"include": ["reasoning.encrypted_content"]}, Ignored((), ("include[0]",))),
        ({"top_logprobs": 3}, Ignored((), ("top_logprobs",))),
        ({"service_tier": "flex"}, Ignored((), ("service_tier",))),
        ({"reasoning": {"effort": "high"}}, Ignored((), ("reasoning.effort",))),
        ({"reasoning": {"context": "auto"}}, Ignored(("reasoning.context",))),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, Ignored()),
        ({"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}, Ignored()),
    ],
)
def test_what_is_accepted(fields: dict[str, Any], ignored: Ignored) -> None:
    assert asked(**fields)[1] == ignored


def test_every_field_of_openais_client_is_known() -> None:
    sent = response_create_params.ResponseCreateParamsBase.__annotations__.keys() | {"stream"}
    unserved = ResponsesRequest.unsupported.keys() | UNSUPPORTED.keys()
    assert sent <= ResponsesRequest.model_fields.keys() | unserved
