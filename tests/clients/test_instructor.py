"""instructor, with tools and with JSON schemas."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel

from tests.clients.server import KEY, MODEL, SPELL, STAR_CHAT, chat

pytest.importorskip("instructor")
import instructor
import openai
from instructor.core.exceptions import InstructorRetryException


class Seen(BaseModel, extra="forbid"):
    """What the picture shows. It forbids other fields, of which the demo checkpoint finds no end;
    for the same reason no mode is tried that asks for any JSON object."""

    shape: Literal["star", "circle", "cross"]
    color: Literal["red", "green", "blue"]


@pytest.fixture(params=[instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def ask(server, request):
    client = openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0)
    made = instructor.from_openai(client, mode=request.param)

    def create(messages, **parameters):
        settings = {"model": MODEL, "temperature": 0, "max_retries": 0, "response_model": Seen}
        return made.chat.completions.create(messages=messages, **{**settings, **parameters})

    return create


def test_structured_output(ask):
    assert isinstance(ask(STAR_CHAT), Seen)


def test_errors(ask):
    with pytest.raises(InstructorRetryException) as told:
        ask(chat(SPELL), model="other")
    assert isinstance(told.value.__cause__, openai.NotFoundError)


def test_rate_limit(ask, busy):
    with pytest.raises(InstructorRetryException) as told:
        ask(chat(SPELL))
    assert isinstance(told.value.__cause__, openai.RateLimitError)
