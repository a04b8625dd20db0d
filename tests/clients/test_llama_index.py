"""LlamaIndex's OpenAILike."""

import base64
from typing import Literal

import pytest
from pydantic import BaseModel

from tests.clients.server import COLORS, KEY, MODEL, SEE, SEEN, SPELL, SPELT, STAR

pytest.importorskip("llama_index.llms.openai_like")
import openai
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

STAR_BLOCK = ImageBlock(image=base64.b64decode(STAR), image_mimetype="image/png")
STAR_MESSAGE = ChatMessage(role="user", blocks=[STAR_BLOCK, TextBlock(text=SEE)])


class Painted(BaseModel):
    color: Literal["red", "green", "blue"]


def paint(color: Literal["red", "green", "blue"]) -> str:
    """Paints a wall."""
    return f"It is {color}."


def model_of(server, **parameters):
    settings = {"model": MODEL, "api_key": KEY, "temperature": 0, "max_retries": 0}
    settings |= {"is_chat_model": True, "is_function_calling_model": True}
    return OpenAILike(api_base=server.v1, **{**settings, **parameters})


@pytest.fixture
def model(server):
    return model_of(server)


def test_text(model):
    assert model.chat([ChatMessage(role="user", content=SPELL)]).message.content == SPELT
    assert model.complete(SPELL).text == SPELT  # A chat of one message.


def test_picture(model):
    assert model.chat([STAR_MESSAGE]).message.content == SEEN


def test_stream(model):
    assert "".join(piece.delta for piece in model.stream_chat([STAR_MESSAGE])) == SEEN


def test_structured_output(server):
    model = model_of(server, should_use_structured_outputs=True)
    assert isinstance(model.as_structured_llm(Painted).chat([STAR_MESSAGE]).raw, Painted)


def test_tool_call(model):
    tool = FunctionTool.from_defaults(paint)
    answer = model.chat_with_tools([tool], "Paint it red.", tool_required=True)
    (call,) = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "paint" and call.tool_kwargs["color"] in COLORS


def test_completions(server):
    model = model_of(server, is_chat_model=False, max_tokens=4)
    assert model.complete("Once").text == "".join(p.delta for p in model.stream_complete("Once"))


def test_errors(server, model):
    with pytest.raises(openai.AuthenticationError):
        model_of(server, api_key="sk-wrong").complete(SPELL)
    with pytest.raises(openai.NotFoundError):
        model_of(server, model="other").complete(SPELL)
    with pytest.raises(openai.BadRequestError, match="context length"):
        model.complete("word " * 9000)


def test_rate_limit(model, busy):
    with pytest.raises(openai.RateLimitError):
        model.complete(SPELL)
