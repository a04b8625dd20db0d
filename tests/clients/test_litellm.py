"""LiteLLM as a library, with its providers `openai` and `hosted_vllm`."""

from __future__ import annotations

from functools import partial
from typing import Literal

import pytest
from pydantic import BaseModel

from tests.clients.server import KEY, MODEL, PAINT, SEEN, SPELL, SPELT, STAR_CHAT, chat

litellm = pytest.importorskip("litellm")


class Painted(BaseModel):
    color: Literal["red", "green", "blue"]


@pytest.fixture(params=["openai", "hosted_vllm"])
def ask(server, request):
    return partial(
        litellm.completion,
        model=f"{request.param}/{MODEL}",
        api_base=server.v1,
        api_key=KEY,
        temperature=0,
        max_retries=0,
    )


def test_text(ask):
    answer = ask(messages=chat(SPELL))
    assert answer.choices[0].message.content == SPELT
    assert answer.usage.completion_tokens > 0


def test_picture(ask):
    assert ask(messages=STAR_CHAT).choices[0].message.content == SEEN


def test_stream(ask):
    chunks = list(ask(messages=STAR_CHAT, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == SEEN
    assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens > 0


def test_structured_output(ask):
    answer = ask(messages=STAR_CHAT, response_format=Painted)
    assert Painted.model_validate_json(answer.choices[0].message.content)


def test_tool_call(ask):
    choice = {"type": "function", "function": {"name": "paint"}}
    answer = ask(messages=chat("Paint it red."), tools=[PAINT], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "paint" and Painted.model_validate_json(call.function.arguments)


def test_errors(ask):
    with pytest.raises(litellm.AuthenticationError):
        ask(messages=chat(SPELL), api_key="sk-wrong")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(messages=chat(SPELL), temperature=9)
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(messages=chat("word " * 9000))
    provider = ask.keywords["model"].partition("/")[0]
    with pytest.raises(litellm.NotFoundError):
        ask(messages=chat(SPELL), model=f"{provider}/other")


def test_rate_limit(ask, busy):
    with pytest.raises(litellm.RateLimitError):
        ask(messages=chat(SPELL))
