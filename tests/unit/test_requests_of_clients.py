"""What popular clients send is accepted, and means what they mean by it."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from openai.types import completion_create_params
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from gateway.api.chat import ChatRequest
from gateway.api.completions import CompletionRequest
from gateway.api.responses.request import ResponsesRequest
from gateway.api.schemas.base import INTEGRAL, Strict
from gateway.api.schemas.parsing import UNSUPPORTED, Ignored, parse
from gateway.prompt.renderer import ChatRenderer
from opticnerve.errors import UnsupportedFeature
from tests import vocabularies as v
from tests.bodies import BASES, DATA, MODELS, TEXT, URL, body, chat, read, refused, user

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


# ---- whole requests, as clients send them

PICTURE = {"type": "image_url", "image_url": {"url": DATA}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CLIENTS: dict[str, dict[str, Any]] = {
    "openai-python": body(user([TEXT, PICTURE]), store=True, metadata={"a": "b"}, user="u"),
    "openai-js": body(
        {"role": "developer", "content": "Be brief."},
        user(),
        {"role": "assistant", "content": None, "refusal": None, "annotations": []},
        user(),
        service_tier="auto",
        safety_identifier="u",
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        verbosity="low",
        reasoning_effort="low",
    ),
    "litellm": body(
        user([TEXT | {"cache_control": {"type": "ephemeral"}},
              {"type": "image_url", "image_url": {"url": DATA, "format": "image/png"}}]),
        {"role": "assistant", "content": "A cat.", "provider_specific_fields": {"refusal": None}},
        user(),
        stream=True,
        stream_options={"include_usage": True},
        parallel_tool_calls=True,
    ),
    "langchain": body(
        user([TEXT, {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}]),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        n=1,
        stream=False,
        stream_options=None,
        stop=None,
        tools=[TOOL],
        tool_choice="none",
    ),
    "llama-index": body(user(additional_kwargs={}), temperature=0.1, max_tokens=None, tools=[]),
    "vercel-ai-sdk": body(
        user([TEXT, PICTURE]),
        max_tokens=100,
        response_format={"type": "text"},
        seed=None,
        tools=None,
        tool_choice=None,
        stream=True,
        stream_options={"include_usage": True},
    ),
    "lm-eval": body(user(type="text"), max_tokens=256, temperature=0, stop=[""], seed=1234),
    "guidellm": body(
        user([TEXT, PICTURE]),
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        max_tokens=64,
        max_completion_tokens=64,
        stop=None,
        ignore_eos=True,
    ),
    "vllm-bench": body(
        user([TEXT]),
        temperature=0.0,
        repetition_penalty=1.0,
        max_completion_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
        ignore_eos=True,
    ),
    "open-webui": body(user(), stream=False, max_completion_tokens=1000, stream_options={}),
    "continue": body(user([TEXT]), max_tokens=4096.0, stream=True, stop=["```", ""], n=1.0),
    "aider": body(
        {"role": "system", "content": [TEXT | {"cache_control": {"type": "ephemeral"}}]},
        user(),
        temperature=0,
        stream=True,
    ),
    "cline": body(
        user(cache_control={"type": "ephemeral"}),
        {"role": "assistant", "content": "", "reasoning_details": [], "tool_calls": []},
        user(),
        stream=True,
        stream_options={"include_usage": True},
        reasoning_effort="medium",
    ),
    "instructor": body(
        user(), response_format={"type": "text", "json_schema": None}, tool_choice="auto", tools=[]
    ),
    "dify": body(user(), max_tokens=-1, top_p=0, top_k=0.0, frequency_penalty=0, user="d"),
}  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_what_popular_clients_send(client: str) -> None:
    parse(ChatRequest, json.dumps(CLIENTS[client]))


def test_every_field_of_openais_client_is_known() -> None:
    sent = CompletionCreateParamsBase.__annotations__.keys() | {"stream"}
    assert sent <= ChatRequest.model_fields.keys() | UNSUPPORTED.keys()
    sent = completion_create_params.CompletionCreateParamsBase.__annotations__.keys() | {"stream"}
    unserved = CompletionRequest.unsupported.keys() | UNSUPPORTED.keys()
    assert sent <= CompletionRequest.model_fields.keys() | unserved


# ---- null stands for an absent field, everywhere


OPTIONAL = [
    (model, name)
    for model in MODELS
    for name, field in model.model_fields.items()
    if not field.is_required() and name not in BASES.get(model.__name__, {})
]


def test_all_models_are_looked_at() -> None:
    assert {model.__name__ for model in MODELS} > BASES.keys()
    assert len(OPTIONAL) > 80


@pytest.mark.parametrize(("model", "name"), OPTIONAL, ids=lambda v: getattr(v, "__name__", v))
def test_null_is_as_absent(model: type[Strict], name: str) -> None:
    base = BASES.get(model.__name__, {})
    assert model.model_validate({**base, name: None}) == model.model_validate(base)
    assert name not in model.model_validate({**base, name: None}).model_fields_set


def test_null_is_no_value_where_one_is_required() -> None:
    for name in ("model", "messages"):
        assert refused({**body(), name: None}).param == name
    assert refused(body(user(None))).param == "messages[0].content"


def test_null_of_every_field_that_is_not_served() -> None:
    assert chat(**dict.fromkeys(UNSUPPORTED)) == chat()


# ---- numbers


def integers(model: type[Strict]) -> Iterator[tuple[str, bool]]:
    """The fields that hold integers, and whether in a list."""

    def held(kind: Any, metadata: tuple[Any, ...], listed: bool) -> Iterator[bool]:
        if kind is int:
            assert INTEGRAL in metadata
            yield listed
        elif typing.get_origin(kind) is Annotated:
            yield from held(kind.__origin__, (*metadata, *kind.__metadata__), listed)
        elif typing.get_origin(kind) in (typing.Union, types.UnionType):
            for each in typing.get_args(kind):
                yield from held(each, metadata, listed)
        elif typing.get_origin(kind) in (list, dict):
            for each in typing.get_args(kind):
                yield from held(each, (), True)

    for name, field in model.model_fields.items():
        for listed in held(field.annotation, tuple(field.metadata), False):
            yield name, listed


INTEGERS = [
    (model, name, listed)
    for model in MODELS
    for name, listed in integers(model)
    if name != "prompt"  # Its list may hold one text instead.
    and (model, name) != (ResponsesRequest, "n")  # It can only be 1.
]


def test_all_integers_are_looked_at() -> None:
    assert {"max_tokens", "n", "seed", "top_k", "top_logprobs", "min_tokens", "priority",
            "stop_token_ids", "allowed_token_ids", "min_pixels"} < {
        name for _, name, _ in INTEGERS
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name", "listed"), INTEGERS, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_a_whole_number_may_be_written_as_a_float(
    model: type[Strict], name: str, listed: bool
) -> None:
    base = BASES.get(model.__name__, {})
    if (model, name) == (ChatRequest, "top_logprobs"):
        base = {**base, "logprobs": True}

    def validated(value: Any) -> Any:
        return getattr(model.model_validate({**base, name: [value] if listed else value}), name)

    found = validated(3.0)
    assert found == ([3] if listed else 3)
    assert type(found[0] if listed else found) is int
    for wrong in (3.5, True, float("inf"), "3.0", "three"):
        with pytest.raises(ValueError, match=name) as caught:
            validated(wrong)
        assert "integer" in str(caught.value)


def test_a_fraction_is_refused_by_name() -> None:
    error = refused(json.dumps(body(max_tokens=20.5)))
    assert error.param == "max_tokens" and "should be an integer" in error.message
    nested = refused(json.dumps(body(mm_processor_kwargs={"max_pixels": 20.5})))
    assert nested.param == "mm_processor_kwargs.max_pixels"


def test_pixels_in_digits() -> None:
    part = {"type": "image", "image": URL, "min_pixels": "3136", "max_pixels": "200704"}
    request = chat(user([part, PICTURE]), mm_processor_kwargs={"max_pixels": "100352"})
    own, other = request.sources
    assert (own.min_pixels, own.max_pixels) == (3136, 200704)
    assert (other.min_pixels, other.max_pixels) == (None, 100352)
    assert refused(json.dumps(body(max_tokens="20"))).param == "max_tokens"


# ---- values that ask for nothing


@pytest.mark.parametrize(
    ("stop", "strings"),
    [("", ()), ([""], ()), ([], ()), (["a", "", "b"], ("a", "b")), ("a", ("a",)), (None, ())],
)
def test_empty_stop_strings_are_none(stop: Any, strings: tuple[str, ...]) -> None:
    assert chat(stop=stop).stop_strings == strings


@pytest.mark.parametrize(
    "metadata", [{"a": {"b": [1, None]}}, [1], "x", 5, True, {f"f{i}": i for i in range(1000)}]
)
def test_metadata_may_be_any_json(metadata: Any) -> None:
    request, ignored = read(metadata=metadata)
    assert request.metadata is None and ignored == Ignored()


@pytest.mark.parametrize(
    "fields",
    [
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stream": False, "stream_options": {"include_usage": True}},
        {"stream": None, "stream_options": {}},
    ],
)
def test_stream_options_without_a_stream(fields: dict[str, Any]) -> None:
    request, ignored = read(**fields)
    assert not request.stream_usage and not request.running_usage and ignored == Ignored()


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "tools": []},
        {"tool_choice": "auto", "tools": None},
        {"tool_choice": None, "tools": []},
        {"parallel_tool_calls": False},
        {"function_call": "none", "functions": []},
        {"tools": [TOOL], "tool_choice": "none"},
    ],
)
def test_tools_that_are_none(fields: dict[str, Any]) -> None:
    request, ignored = read(**fields)
    assert request.tool_use is None and request.chat.tools == () and ignored == Ignored()


def test_functions_that_may_not_be_called() -> None:
    assert read(functions=[{}], function_call="none")[1].without_effect == ("functions",)
    with pytest.raises(UnsupportedFeature, match="tools"):
        chat(functions=[{"name": "f"}])


def test_a_field_without_a_name_forbids_nothing() -> None:
    asked = {**body(), "modalities": ["audio"], "": "none"}
    with pytest.raises(UnsupportedFeature, match="modalities"):
        parse(ChatRequest, asked, ignore_unknown=True)


@pytest.mark.parametrize(
    ("fields", "without_effect"),
    [
        ({"store": True}, ("store",)),
        ({"store": False}, ()),
        ({"service_tier": "flex"}, ("service_tier",)),
        ({"service_tier": "auto"}, ()),
        ({"verbosity": "high"}, ("verbosity",)),
        ({"verbosity": "medium"}, ()),
        ({"reasoning_effort": "high"}, ("reasoning_effort",)),
        ({"reasoning_effort": "none"}, ()),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            ("stream_options.continuous_usage_stats",),
        ),
        ({"response_format": {"type": "text", "json_schema": None}}, ()),
        ({"guided_decoding_backend": "xgrammar"}, ("guided_decoding_backend",)),
    ],
)
def test_what_is_accepted_without_effect(fields: dict[str, Any], without_effect: Any) -> None:
    assert read(**fields)[1] == Ignored((), without_effect)


# ---- messages and their parts


@pytest.mark.parametrize(
    ("part", "url"),
    [
        ({"type": "image", "base64": DATA}, DATA),
        ({"type": "image", "base64": " DATA:image/png;base64,AAAA"}, "DATA:image/png;base64,AAAA"),
        ({"type": "image", "base64": "iVBORw0KGgo="}, "data:;base64,iVBORw0KGgo="),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "original"}}, URL),
        ({"type": "image_url", "image_url": {"url": URL, "format": "image/png"}}, URL),
        ({"type": "image_url", "image_url": URL, "cache_control": {"type": "ephemeral"}}, URL),
    ],
)
def test_pictures(part: dict[str, Any], url: str) -> None:
    request, ignored = read(user([part]))
    (image,) = request.sources
    assert image.url == url and not image.low_detail
    assert ignored == Ignored()


@pytest.mark.parametrize("silent", [{}, {"content": None}, {"content": None, "tool_calls": []}])
def test_an_assistant_that_says_nothing(silent: dict[str, Any]) -> None:
    request = chat(user(), {"role": "assistant", **silent}, user())
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT)
    empty = chat(user(), {"role": "assistant", "content": ""}, user())
    assert renderer.render(request) == renderer.render(empty)


def test_reasoning_effort_is_a_variable_where_the_template_has_it() -> None:
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT)
    assert "reasoning_effort" not in renderer.template.variables
    assert renderer.render(chat(reasoning_effort="high")) == renderer.render(chat())
    source = "{{ reasoning_effort }}: {{ messages[0].content }}"
    renderer = ChatRenderer.load(v.DEMO, v.DEMO_LAYOUT, source)
    assert "reasoning_effort" in renderer.template.variables
    assert renderer.render(chat(reasoning_effort="high")).prompt == "high: hi"
    kwargs = {"reasoning_effort": "odd"}
    told = chat(reasoning_effort="high", chat_template_kwargs=kwargs)
    assert renderer.render(told).prompt == "odd: hi"
