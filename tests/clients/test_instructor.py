"""instructor, with tools and with JSON schemas."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel

from tests.clients.server import KEY, MODEL, SPELL, STAR_CHAT, chat

instructor = pytest.importorskip("instructor")
import openai


class Seen(BaseModel):
    """What the picture shows."""

    shape: Literal["star", "circle", "cross"]
    color: Literal["red", "green", "blue"]


@pytest.fixture(params=[instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON])
def ask(server, request):
    client = openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0)
    made = instructor.from_openai(client, mode=request.param)

    def create(messages, **parameters):
        settings = {"model": MODEL, "temperature": 0, "max_retries": 0, "response_model": Seen}
        return made.chat.completions.create(messages=messages, **{**settings, **parameters})

    return create


def test_structured_output(ask):
    assert ask(STAR_CHAT) == Seen(shape="star", color="red")


def test_errors(ask):
    with pytest.raises(instructor.exceptions.InstructorRetryException) as told:
        ask(chat(SPELL), model="other")
    assert isinstance(told.value.__cause__, openai.NotFoundError)


def test_rate_limit(ask, busy):
    with pytest.raises(instructor.exceptions.InstructorRetryException) as told:
        ask(chat(SPELL))
    assert isinstance(told.value.__cause__, openai.RateLimitError)
