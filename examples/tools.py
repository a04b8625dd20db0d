"""The model calls a function of yours, with arguments that follow its schema."""

from __future__ import annotations

import json

from openai import OpenAI

from examples.picture import KEY, STAR, URL, data_url

DRAW = {
    "name": "draw",
    "description": "Draws a shape.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "shape": {"enum": ["circle", "star", "triangle"]},
            "sides": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["shape", "sides"],
        "additionalProperties": False,
    },
}


def draw(shape: str, sides: int) -> str:
    return f"drew a {shape} with {sides} sides"


client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
answer = client.chat.completions.create(
    model="model",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_url(STAR)}},
                {"type": "text", "text": "Draw this."},
            ],
        }
    ],
    tools=[{"type": "function", "function": DRAW}],
    tool_choice="required",  # "auto" leaves it to the model.
    max_tokens=200,
    temperature=0,
)
for call in answer.choices[0].message.tool_calls:
    print(draw(**json.loads(call.function.arguments)))
