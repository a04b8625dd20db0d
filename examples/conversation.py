"""Two turns of a chat. The second sends the picture again, as clients do; it is not encoded again,
and the prompt's beginning is not computed again. The timings of each answer say so."""

from __future__ import annotations

from openai import OpenAI

from examples.picture import KEY, PAIR, URL, data_url

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
picture = {"type": "image_url", "image_url": {"url": data_url(PAIR)}}
messages = []
for question in ("Describe the image as JSON.", "What color is the triangle?"):
    content = [{"type": "text", "text": question}]
    messages.append({"role": "user", "content": content if messages else [picture, *content]})
    answer = client.chat.completions.create(
        model="model", messages=messages, temperature=0, extra_body={"timings": True}
    )
    text = answer.choices[0].message.content
    messages.append({"role": "assistant", "content": text})
    timings = answer.timings
    print(f"{question}\n  {text}")
    print(f"  the picture: {timings['items'][0]['cached']}, where `no` means encoded now")
    print(f"  cached tokens: {answer.usage.prompt_tokens_details.cached_tokens}")
    print(f"  first token after {timings['ttft_ms']:.0f} ms")
