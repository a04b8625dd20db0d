"""The openai package: `pip install openai`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import pytest
from pydantic import BaseModel

from tests.clients.server import (
    KEY, MODEL, SEEN, SPELL, SPELT, STAR_CHAT, Server, chat,
)  # fmt: skip

openai = pytest.importorskip("openai")


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0) as made:
        yield made


class Seen(BaseModel):
    shape: Literal["star", "circle", "cross"]
    color: Literal["red", "green", "blue"]
    several: bool


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
