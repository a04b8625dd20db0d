"""Anthropic's SDK for Python."""

from __future__ import annotations

import pytest

from tests.clients.server import COLORS, KEY, MODEL, PAINTED, SEE, SEEN, SPELL, SPELT, STAR, chat

anthropic = pytest.importorskip("anthropic")

STAR_MESSAGES = [
    {
        "role": "user",
        "content": [
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": STAR},
            },
            {"type": "text", "text": SEE},
        ],
    }
]


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as made:
        yield made


# The package has no parameter for the temperature any more.
SETTINGS = {"model": MODEL, "max_tokens": 64, "extra_body": {"temperature": 0}}


def ask(client, messages, **parameters):
    return client.messages.create(messages=messages, **{**SETTINGS, **parameters})


def test_text(client):
    answer = ask(client, chat(SPELL))
    assert answer.content[0].text == SPELT and answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0


def test_picture(client):
    assert ask(client, STAR_MESSAGES).content[0].text == SEEN


def test_stream(client):
    with client.messages.stream(messages=STAR_MESSAGES, **SETTINGS) as stream:
        told = "".join(stream.text_stream)
        whole = stream.get_final_message()
    assert told == whole.content[0].text == SEEN and whole.usage.output_tokens > 0


def test_count_tokens(client):
    counted = client.messages.count_tokens(model=MODEL, messages=STAR_MESSAGES)
    usage = ask(client, STAR_MESSAGES).usage  # Its input_tokens are those that were not cached.
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_tool_call(client):
    tool = {"name": "paint", "description": "Paints a wall.", "input_schema": PAINTED}
    choice = {"type": "tool", "name": "paint"}
    asked = {"tools": [tool], "tool_choice": choice}
    (call,) = ask(client, chat("Paint it red."), **asked).content
    assert call.type == "tool_use" and call.name == "paint"
    assert call.input["color"] in COLORS
    with client.messages.stream(messages=chat("Paint it red."), **SETTINGS, **asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.input == call.input


def test_errors(client):
    with pytest.raises(anthropic.AuthenticationError):
        ask(client.with_options(api_key="sk-wrong"), chat(SPELL))
    with pytest.raises(anthropic.NotFoundError):
        ask(client, chat(SPELL), model="other")
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        ask(client, chat(SPELL), extra_body={"temperature": 9})


def test_rate_limit(client, busy):
    with pytest.raises(anthropic.RateLimitError):
        ask(client, chat(SPELL))
