"""LangChain's ChatOpenAI."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel

from tests.clients.server import KEY, MODEL, PAINT, SEEN, SPELL, SPELT, STAR_CHAT

pytest.importorskip("langchain_openai")
import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI


class Painted(BaseModel):
    """Paints a wall."""

    color: Literal["red", "green", "blue"]


def model_of(server, **parameters):
    settings = {"model": MODEL, "api_key": KEY, "temperature": 0, "max_retries": 0}
    return ChatOpenAI(base_url=server.v1, **{**settings, **parameters})


@pytest.fixture
def model(server):
    return model_of(server)


def test_text(model):
    answer = model.invoke(SPELL)
    assert answer.content == SPELT and answer.usage_metadata["output_tokens"] > 0


def test_picture(model):
    assert model.invoke(STAR_CHAT).content == SEEN


def test_stream(model):
    assert "".join(chunk.content for chunk in model.stream(STAR_CHAT)) == SEEN


def test_batch(model):
    assert [answer.content for answer in model.batch([SPELL, STAR_CHAT])] == [SPELT, SEEN]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model, method):
    found = model.with_structured_output(Painted, method=method).invoke(STAR_CHAT)
    assert isinstance(found, Painted)


@pytest.mark.parametrize("choice", ["paint", "any"])
def test_tool_call(model, choice):
    bound = model.bind_tools([PAINT], tool_choice=choice, parallel_tool_calls=False)
    (call,) = bound.invoke("Paint it red.").tool_calls
    assert call["name"] == "paint" and Painted.model_validate(call["args"])


def test_errors(server, model):
    with pytest.raises(openai.AuthenticationError):
        model_of(server, api_key="sk-wrong").invoke(SPELL)
    with pytest.raises(openai.NotFoundError):
        model_of(server, model="other").invoke(SPELL)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        model_of(server, temperature=9).invoke(SPELL)
    with pytest.raises(ContextOverflowError):
        model.invoke("word " * 9000)


def test_rate_limit(model, busy):
    with pytest.raises(openai.RateLimitError):
        model.invoke(SPELL)
