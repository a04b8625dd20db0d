"""A question about a picture, with OpenAI's client; the answer is printed as it comes."""

from __future__ import annotations

from openai import OpenAI

from examples.picture import KEY, STAR, URL, data_url

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
picture = {"type": "image_url", "image_url": {"url": data_url(STAR)}}
question = {"type": "text", "text": "What do you see?"}
stream = client.chat.completions.create(
    model="model",
    messages=[{"role": "user", "content": [picture, question]}],
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
