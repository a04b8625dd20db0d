"""The openai package: `pip install openai`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Literal

import pytest
from pydantic import BaseModel

from tests.clients.server import (
    COLORS,
    KEY,
    MODEL,
    PAINT,
    PAINTED,
    SEE,
    SEEN,
    SPELL,
    SPELT,
    STAR_CHAT,
    STAR_URL,
    Server,
    chat,
)

openai = pytest.importorskip("openai")


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0) as made:
        yield made


class Seen(BaseModel):
    shape: Literal["star", "circle", "cross"]
    color: Literal["red", "green", "blue"]
    several: bool


STAR_INPUT = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": SEE},
            {"type": "input_image", "image_url": STAR_URL, "detail": "auto"},
        ],
    }
]
NAMED = {"type": "function", "function": {"name": "paint"}}


def test_text(client):
    answer = client.chat.completions.create(model=MODEL, messages=chat(SPELL), temperature=0)
    assert answer.choices[0].message.content == SPELT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens > answer.usage.completion_tokens > 0


def test_picture(client):
    answer = client.chat.completions.create(model=MODEL, messages=STAR_CHAT, temperature=0)
    assert answer.choices[0].message.content == SEEN


def test_stream(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=STAR_CHAT,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == SEEN
    assert chunks[-1].usage.completion_tokens > 0


def test_stream_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=STAR_CHAT, temperature=0) as stream:
        told = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion()
    assert "".join(told) == whole.choices[0].message.content == SEEN


def test_async(server):
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=server.v1, api_key=KEY) as client:
            asked = client.chat.completions.create(model=MODEL, messages=chat(SPELL), temperature=0)
            stream = await client.chat.completions.create(
                model=MODEL, messages=STAR_CHAT, temperature=0, stream=True
            )
            pieces = [chunk.choices[0].delta.content async for chunk in stream]
            return (await asked).choices[0].message.content, "".join(pieces)

    assert asyncio.run(ask()) == (SPELT, SEEN)


def test_structured_output(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=STAR_CHAT, temperature=0, response_format=Seen
    )
    assert answer.choices[0].message.parsed == Seen.model_validate_json(
        answer.choices[0].message.content
    )
    with client.chat.completions.stream(
        model=MODEL, messages=STAR_CHAT, temperature=0, response_format=Seen
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == (
            answer.choices[0].message.parsed
        )


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_tool_call(client, choice):
    asked = {"model": MODEL, "messages": chat("Paint it red."), "temperature": 0}
    asked |= {"tools": [PAINT], "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["color"] in COLORS
    with client.chat.completions.stream(**asked) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is dry."}
    asked["messages"] += [answer.choices[0].message, result]
    asked["tool_choice"] = "none"
    assert client.chat.completions.create(**asked, max_tokens=8).choices[0].message.content


def test_responses(client):
    asked = {"model": MODEL, "input": STAR_INPUT, "temperature": 0, "store": False}
    answer = client.responses.create(**asked)
    assert answer.output_text == SEEN and answer.status == "completed"
    assert answer.usage.output_tokens > 0
    with client.responses.stream(**asked) as stream:
        told = [each.delta for each in stream if each.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(told) == SEEN


def test_responses_structured_output(client):
    answer = client.responses.parse(
        model=MODEL, input=STAR_INPUT, temperature=0, text_format=Seen, store=False
    )
    assert answer.output_parsed == Seen.model_validate_json(answer.output_text)


def test_responses_tool_call(client):
    tool = {"type": "function", "name": "paint", "parameters": PAINTED, "strict": True}
    answer = client.responses.create(
        model=MODEL, input="Paint it red.", temperature=0, tools=[tool], tool_choice="required",
        parallel_tool_calls=False, store=False,
    )  # fmt: skip
    (call,) = (item for item in answer.output if item.type == "function_call")
    assert call.name == "paint" and json.loads(call.arguments)["color"] in COLORS


def test_realtime(client):
    pytest.importorskip("websockets", reason="openai[realtime] is not installed")
    with client.realtime.connect(model=MODEL) as connection:
        session = {"type": "realtime", "output_modalities": ["text"]}
        connection.session.update(session=session)
        connection.conversation.item.create(item={"type": "message", **STAR_INPUT[0]})
        connection.response.create()
        told = ""
        for event in connection:
            assert event.type != "error", event
            if event.type == "response.output_text.delta":
                told += event.delta
            if event.type == "response.done":
                assert event.response.status == "completed"
                break
    assert told == SEEN


def test_models(client):
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completions(client):
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=4, temperature=0)
    stream = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=4, temperature=0, stream=True
    )
    assert answer.choices[0].text == "".join(chunk.choices[0].text for chunk in stream)
    assert answer.usage.completion_tokens > 0


def test_errors(server, client):
    wrong = client.with_options(api_key="sk-wrong")
    with pytest.raises(openai.AuthenticationError) as told:
        wrong.models.list()
    assert told.value.status_code == 401 and told.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as told:
        client.chat.completions.create(model="other", messages=chat(SPELL))
    assert told.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model=MODEL, messages=chat(SPELL), temperature=9)
    assert told.value.param == "temperature" and "temperature" in told.value.message
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model=MODEL, messages=chat("word " * 9000))
    assert told.value.code == "context_length_exceeded"


def test_rate_limit(client, busy):
    with pytest.raises(openai.RateLimitError) as told:
        client.chat.completions.create(model=MODEL, messages=chat(SPELL))
    assert told.value.code == "overloaded" and int(told.value.response.headers["retry-after"]) > 0
