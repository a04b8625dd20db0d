"""A realtime session over a WebSocket, with OpenAI's client: events in, events out."""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI

from examples.picture import KEY, STAR, URL, data_url


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY)
    async with client.realtime.connect(model="model") as session:
        await session.session.update(
            session={"type": "realtime", "output_modalities": ["text"], "temperature": 0}
        )
        picture = {"type": "input_image", "image_url": data_url(STAR)}
        question = {"type": "input_text", "text": "What do you see?"}
        await session.conversation.item.create(
            item={"type": "message", "role": "user", "content": [picture, question]}
        )
        await session.response.create()
        async for event in session:
            if event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
            elif event.type == "response.done":
                break
            elif event.type == "error":
                raise SystemExit(event.error.message)
    print()


asyncio.run(main())
