"""What a chat request may say, and what is said about one that may not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

from gateway.api.apply_template import ApplyTemplateRequest
from gateway.api.chat import ChatRequest
from gateway.api.schemas import parsing
from gateway.api.schemas.messages import FunctionCall, ItemSource, ToolCall, call_arguments
from gateway.api.schemas.parsing import UNSUPPORTED, UNSUPPORTED_PARTS, Ignored, parse
from opticnerve.errors import InvalidRequest, UnsupportedFeature
from opticnerve.media.plan import Overrides

URL = "https://example.com/a.png"
TEXT = {"type": "text", "text": ""}


def body(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "model", "messages": [{"role": "user", "content": content}], **fields}


def chat(content: Any = "hi", **fields: Any) -> ChatRequest:
    return parse(ChatRequest, body(content, **fields))[0]


def refused(
    request: dict[str, Any] | bytes, kind: type[InvalidRequest] = InvalidRequest
) -> InvalidRequest:
    with pytest.raises(kind) as caught:
        parse(ChatRequest, request)
    assert caught.value.http_status == 400
    assert len(caught.value.message) < 1000
    return caught.value


# ---- what is accepted


def test_the_customers_requests() -> None:
    curl = {
        "model": "model",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Describe."},
                    {"type": "image_url", "image_url": {"url": URL}},
                ],
            }
        ],
        "max_completion_tokens": 128,
        "top_p": 0.001,
        "temperature": 0.1,
        "frequency_penalty": 1.05,
    }
    request, ignored = parse(ChatRequest, json.dumps(curl).encode())
    assert request.options.max_tokens == 128
    assert request.sources == (ItemSource(URL, "messages[0].content[1].image_url.url"),)
    assert ignored == Ignored()


def test_neutral_values_of_everything_else() -> None:
    for name, field in UNSUPPORTED.items():
        for value in (None, *field.neutral):
            chat(**{name: value})


def test_every_field_at_once() -> None:
    request = chat(
        max_tokens=5,
        max_completion_tokens=5,
        temperature=1,
        top_p=1,
        top_k=-1,
        min_p=0,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        stop=["a", "b"],
        seed=-1,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"5": -100},
        stop_token_ids=[1],
        bad_words=["x"],
        allowed_token_ids=[1, 2],
        user="u",
        metadata={"a": "b"},
        timings=True,
        cache_salt="s",
        priority=-1,
    )
    assert request.stop_strings == ("a", "b")
    assert request.stream_options is not None and request.stream_options.include_usage
    assert chat(stop="x").stop_strings == ("x",)
    assert chat().stop_strings == ()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": URL}, (URL, "image_url")),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
            (URL, "image_url.url"),
        ),
        ({"type": "image", "image": URL}, (URL, "image")),
        ({"type": "image", "url": URL}, (URL, "url")),
        ({"type": "image", "base64": "AAAA"}, ("data:;base64,AAAA", "base64")),
        ({"type": "image", "image": "iVBORw0KGgoAAAANSUhEUg=="}, (None, "image")),
        ({"type": "image", "image": "data:image/png;base64,AAAA"}, (None, "image")),
        ({"type": "image", "image": "file:///tmp/a.png"}, ("file:///tmp/a.png", "image")),
    ],
)
def test_forms_of_a_picture(part: dict[str, Any], source: tuple[str | None, str]) -> None:
    (image,) = chat([part]).sources
    assert image.param == f"messages[0].content[0].{source[1]}"
    assert image.url.startswith(source[0] or "data:")


def test_an_answer_can_be_sent_back() -> None:
    answer = ChatCompletionMessage(role="assistant", content="A cat.").model_dump()
    messages = [*body()["messages"], answer, {"role": "user", "content": "sure?"}]
    assert parse(ChatRequest, {"model": "m", "messages": messages})[0].messages[1].content


def test_bounds_of_a_picture() -> None:
    own = {"type": "image", "image": URL, "min_pixels": 5, "max_pixels": 50}
    inner = {"type": "image_url", "image_url": {"url": URL, "max_pixels": 7}, "max_pixels": 9}
    plain = {"type": "image", "image": URL}
    request = chat([own, inner, plain], mm_processor_kwargs={"min_pixels": 2, "max_pixels": 99})
    bounds = [(image.min_pixels, image.max_pixels) for image in request.sources]
    assert bounds == [(5, 50), (2, 7), (2, 99)]


def test_low_detail_is_a_hint() -> None:
    low = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
    bounded = {"type": "image_url", "image_url": {"url": URL, "detail": "low", "max_pixels": 9}}
    first, second = chat([low, bounded]).sources
    assert first.overrides(10**6) == Overrides(None, 512 * 512)
    assert first.overrides(10**4) == Overrides()  # Never raises the model's own bound.
    assert first.overrides(None) == Overrides()
    assert second.overrides(10**6) == Overrides(None, 9)


def test_apply_template_takes_messages_alone() -> None:
    request, _ = parse(ApplyTemplateRequest, {"messages": [{"role": "user", "content": "x"}]})
    assert request.add_generation_prompt


# ---- what is refused, and how


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"max_tokens": "5"}, "max_tokens", "should be an integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, or -1 for no limit"),
        ({"max_tokens": 0.0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": -2}, "max_completion_tokens", "-1 for no limit"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 10**30}, "max_tokens", "less than or equal"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"stream": "true"}, "stream", "should be a boolean"),
        ({"stream": 1}, "stream", "boolean"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"stop": [1]}, "stop[0]", "should be a string"),
        ({"stop": "x" * 1025}, "stop", "at most 1024 characters"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "a boolean"),
        ({"store": "yes"}, "store", "should be a boolean"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'high'"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"foo": 1}, "foo", "unknown field"),
        ({"model": ""}, "model", "at least 1 character"),
        ({"model": None}, "model", "string"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "excludes",
        ),
        ({"chat_template_kwargs": {"x": [[]] * 9000}}, "chat_template_kwargs", "at most 16384"),
        ({"chat_template_kwargs": {"x" * 17000: 1}}, "chat_template_kwargs", "at most 16384"),
        ({"mm_processor_kwargs": {"max_pixels": 0}}, "mm_processor_kwargs.max_pixels", "at least"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], param: str | None, text: str) -> None:
    error = refused(body(**fields))
    assert error.param == param
    text = text.replace("at least", "greater than or equal") if "pixels" in str(param) else text
    assert text in error.message
    if param:
        assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("message", "param", "text"),
    [
        ({"role": "user", "content": 5}, "messages[0].content", "should be a string or a list"),
        (
            {"role": "user", "content": {"type": "text", "text": "x"}},
            "messages[0].content",
            "messages[0].content: should be a string or a list",
        ),
        ({"role": "user"}, "messages[0].content", "a string or a list of parts"),
        ({"role": "user", "content": None}, "messages[0].content", "a string or a list"),
        ({"role": "tool"}, "messages[0].content", "a string or a list of parts"),
        ({"content": "x"}, "messages[0].role", "required"),
        ({"role": "king", "content": "x"}, "messages[0].role", "'user'"),
        ({"role": "user", "content": "x", "name": 1}, "messages[0].name", "a string"),
        ("hi", "messages[0]", "should be an object"),
    ],
)
def test_wrong_messages(message: Any, param: str, text: str) -> None:
    error = refused({"model": "m", "messages": [message]})
    assert (error.param, text in error.message) == (param, True), error.message


@pytest.mark.parametrize(
    ("part", "path", "text"),
    [
        ({"text": "x"}, "", "should have a type"),
        ({"type": "picture"}, "", "of type text, image_url or image"),
        ({"type": 5}, "", "type"),
        ("x", "", "type"),
        ({"type": "text"}, ".text", "required"),
        ({"type": "text", "text": 5}, ".text", "should be a string"),
        ({"type": "text", "text2": "y"}, ".text", "required"),
        ({"type": "image_url"}, ".image_url", "required"),
        ({"type": "image_url", "image_url": 5}, ".image_url", "a string or an object"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url", "required"),
        ({"type": "image_url", "image_url": {"url": 5}}, ".image_url.url", "a string"),
        ({"type": "image_url", "image_url": {"url": " "}}, ".image_url.url", "not be empty"),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "x"}},
            ".image_url.detail",
            "'low'",
        ),
        ({"type": "image"}, "", "exactly one"),
        ({"type": "image", "image": URL, "url": URL}, "", "exactly one"),
        ({"type": "image", "image": URL, "max_pixels": "9.5"}, ".max_pixels", "integer"),
        ({"type": "image", "image": URL, "max_pixels": "0"}, ".max_pixels", "greater than"),
        ({"type": "image", "image": URL, "max_pixels": "9" * 10}, ".max_pixels", "less than"),
        ({"type": "image", "image": URL, "max_pixels": "9" * 5000}, ".max_pixels", "integer"),
    ],
)
def test_wrong_parts(part: Any, path: str, text: str) -> None:
    error = refused(body([{"type": "text", "text": "see:"}, part]))
    assert error.param == "messages[0].content[1]" + path
    assert text in error.message


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "picture.png"},
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image", "image": "not a url at all, really"},
        {"type": "image", "image": URL, "min_pixels": 9, "max_pixels": 8},
    ],
)
def test_pictures_that_name_nothing(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _ = chat([part]).sources
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages[0].content[0]")


@pytest.mark.parametrize("kind", UNSUPPORTED_PARTS)
def test_parts_of_other_servers(kind: str) -> None:
    error = refused(body([{"type": kind, kind: {"url": URL}}]), UnsupportedFeature)
    assert error.param == "messages[0].content[0].type"
    assert kind in error.message
    assert error.code == "unsupported"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modalities", ["text", "audio"]),
        ("functions", [{"name": "f"}]),
        ("use_beam_search", True),
        ("best_of", 2),
        ("best_of", True),  # Not 1.
        ("ebnf", 'root ::= "a"'),
    ],
)
def test_fields_of_other_servers(name: str, value: Any) -> None:
    error = refused(body(**{name: value}), UnsupportedFeature)
    assert error.param == name
    assert error.message.startswith(f"{name}: not supported by this server; ")


def test_uuid_says_what_to_send() -> None:
    part = {"type": "image_url", "image_url": None, "uuid": "a"}
    assert "the picture itself" in refused(body([part]), UnsupportedFeature).message
    named = {"type": "image_url", "image_url": {"url": URL}, "uuid": "a"}
    assert len(chat([named]).sources) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_bodies_that_are_not_objects_of_json(raw: bytes) -> None:
    assert refused(raw).param is None


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_numbers_beyond_floats(number: str) -> None:
    raw = json.dumps(body(top_p="?")).replace('"?"', number).encode()
    assert refused(raw).param == "top_p"


def test_text_that_is_no_json_has_a_code() -> None:
    assert refused(b'{"model": }').code == "invalid_json"
    assert refused(b"[]").code is None


@pytest.mark.parametrize("around", ["{}", " {}", "{}\n", "\t{} "])
def test_white_space_around_a_source_counts_for_nothing(around: str) -> None:
    for url in (URL, "data:image/png;base64,AAAA"):
        part = {"type": "image_url", "image_url": {"url": around.format(url)}}
        bare = {"type": "image", "image": around.format(url)}
        assert [source.url for source in chat([part, bare]).sources] == [url, url]


def test_values_are_never_repeated() -> None:
    secret = "s3cret" * 10_000
    for fields in ({"temperature": secret}, {"messages": secret}, {"stop": [{"a": secret}]}):
        assert "s3cret" not in refused({**body(), **fields}).message
    long_name = "n" * 5_000
    assert len(refused(body(**{long_name: 1})).message) < 200
    many = refused(body(**{f"unknown{i}": 1 for i in range(100)}))
    assert many.message.endswith("and 95 more")
    assert many.code == "unknown_field"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({f"f{i}": 1 for i in range(100_000)}, "too many fields"),
        ({"messages": [1] * 100_000}, "should be an object"),
        ({"messages": [{"role": "user", "content": [{}] * 100_000}]}, "should have a type"),
        ({"messages": [{"role": "user", "content": ""}] * 5000}, "at most 4096"),
        ({"messages": [{"role": "user", "content": [TEXT] * 5000}]}, "at most 4096"),
        ({"logit_bias": {f"{i}": "x" for i in range(100_000)}}, "at most 1024"),
        ({"allowed_token_ids": ["x"] * 100_000}, "should be an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_body_of_many_problems_is_refused_for_the_first(
    fields: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To tell a hundred thousand problems took minutes, and a kilobyte each."""
    told: list[int] = []
    refusal = parsing._refusal

    def counting(problems: Any, *more: Any) -> InvalidRequest:
        told.append(len(problems))
        return refusal(problems, *more)

    monkeypatch.setattr(parsing, "_refusal", counting)
    raw = json.dumps({**body(), **fields})
    for ignore in (False, True):
        with pytest.raises(InvalidRequest, match=text):
            parse(ChatRequest, raw, ignore_unknown=ignore)
    assert max(told) <= 2  # Of a string or a list, each may have one.


def test_many_unknown_fields_everywhere() -> None:
    parts = [{"type": "text", "text": "x", **{f"f{i}": 1 for i in range(200)}}] * 500
    raw = json.dumps(body(parts)).encode()
    request, ignored = parse(ChatRequest, raw)
    assert ignored.unknown[0] == "messages[0].content[0].f0"
    assert len(ignored.unknown) == 100
    assert request.messages[0].content[499].text == "x"  # type: ignore[index, union-attr]


def test_unknown_fields_can_be_ignored() -> None:
    part = {"type": "text", "text": "x", "more": {}}
    request, ignored = parse(ChatRequest, body([part], foo=1, bar={"baz": 2}), ignore_unknown=True)
    assert set(ignored.unknown) == {"messages[0].content[0].more", "foo", "bar"}
    assert request.messages[0].content[0].text == "x"  # type: ignore[index, union-attr]
    with pytest.raises(InvalidRequest, match="max_tokens"):
        parse(ChatRequest, body(foo=1, max_tokens="x"), ignore_unknown=True)
    with pytest.raises(UnsupportedFeature):
        parse(ChatRequest, body(functions=[{}]), ignore_unknown=True)


def test_arguments_of_earlier_calls() -> None:
    def message(arguments: Any) -> Any:
        call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": arguments}}
        fields = {"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]}
        return parse(ChatRequest, fields)[0].messages[0].tool_calls[0]  # type: ignore[index]

    assert call_arguments(message('{"a": 1}'), "x") == {"a": 1}
    assert call_arguments(message({"a": 1}), "x") == {"a": 1}
    assert call_arguments(message(""), "x") == {}
    with pytest.raises(InvalidRequest, match="at most 65536 values") as caught:
        message("[" + "[]," * 70_000 + "[]]")
    assert caught.value.param == "messages"
    for wrong in ("[1]", "{", "5"):
        with pytest.raises(InvalidRequest, match="JSON object") as caught:
            call_arguments(message(wrong), "messages[0].tool_calls[0]")
        assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = st.sampled_from(
    sorted({*ChatRequest.model_fields, *UNSUPPORTED, "role", "content", "type"})
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(NAMES, JSON, max_size=5), messages=JSON)
def test_any_json_is_parsed_or_refused(fields: dict[str, Any], messages: Any) -> None:
    raw = {"model": "m", "messages": messages, **fields}
    for ignore in (False, True):
        try:
            parse(ChatRequest, raw, ignore_unknown=ignore)
        except InvalidRequest as error:
            assert len(error.message) < 2000


@pytest.mark.parametrize("long", ["a" * 2**18, 'é"\\' * 2**17, "\U0001f600" * 2**18])
def test_long_arguments_are_read_as_short_ones(long: str) -> None:
    def call(arguments: str) -> ToolCall:
        return ToolCall(function=FunctionCall(name="f", arguments=arguments))

    value = {"text": long, "more": [1, {"b": None}]}
    assert call_arguments(call(json.dumps(value)), "x") == value
    assert call_arguments(call(json.dumps(value, ensure_ascii=False)), "x") == value
    for wrong in (json.dumps([long]), json.dumps(value)[:-1], f'{{"a": "{long}\x01"}}'):
        with pytest.raises(InvalidRequest) as caught:
            call_arguments(call(wrong), "messages[0].tool_calls[0]")
        assert caught.value.param == "messages[0].tool_calls[0].function.arguments"
        assert len(caught.value.message) < 200


def test_a_long_source_is_known_by_its_beginning() -> None:
    for image in ("A" * 2**22, "a" * 2**22 + ":"):
        source = chat([{"type": "image", "image": image}]).sources[0]
        assert source.url == "data:;base64," + image
