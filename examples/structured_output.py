"""An answer that follows a JSON schema, whatever the model would have written."""

from __future__ import annotations

import json

from openai import OpenAI

from examples.picture import KEY, PAIR, URL, data_url

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle"]},
        "large": {"type": "boolean"},
    },
    "required": ["shape", "large"],
    "additionalProperties": False,
}
client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
answer = client.chat.completions.create(
    model="model",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_url(PAIR)}},
                {"type": "text", "text": "Describe the image as JSON."},
            ],
        }
    ],
    response_format={"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA}},
    temperature=0,
)
found = json.loads(answer.choices[0].message.content)
print(f"shape: {found['shape']}, large: {found['large']}")
