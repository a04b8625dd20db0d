"""A realtime session as the openai client has it."""

import asyncio

import openai
import pytest

from tests.e2e.conftest import bundled

pytestmark = pytest.mark.anyio


async def answer(connection, **response):
    """The events of a response, up to its end, and its text."""
    await connection.response.create(**response)
    events = []
    async for event in connection:
        assert event.type != "error", event
        events.append(event)
        if event.type == "response.done":
            break
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    text = event.response.output[0].content[0].text
    assert text == "".join(deltas)
    return event.response, text


async def test_pictures_turns_and_a_cancelled_response(stack):
    client = openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none")
    async with client.realtime.connect(model="model") as connection:
        created = await connection.recv()
        assert created.type == "session.created" and created.session.model == "model"
        settings = {"type": "realtime", "output_modalities": ["text"], "temperature": 0}
        await connection.session.update(session=settings)
        picture = {"type": "input_image", "image_url": bundled("pair.png")}
        question = {"type": "input_text", "text": "Describe the image as JSON."}
        await connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": [picture, question]}
        )
        done, text = await answer(connection)
        assert done.status == "completed" and "triangle" in text and "green" in text
        assert done.usage.input_token_details.image_tokens > 0
        more = {"type": "input_text", "text": "What color is the triangle?"}
        await connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": [more]}
        )
        done, text = await answer(connection)
        assert text == "The triangle is green."
        assert done.usage.input_token_details.cached_tokens > 0
        done, _ = await answer(connection, response={"max_output_tokens": 2})
        assert done.status == "incomplete"
        assert done.status_details.reason == "max_output_tokens"

        await connection.send({"type": "input_audio_buffer.append", "audio": "AAAA"})
        refused = await connection.recv()
        assert refused.type == "error" and refused.error.code == "unsupported"
    await asyncio.wait_for(client.close(), 10)
