"""For evaluators: the prompt that a chat becomes, and how likely the model finds given answers.

The chat template is the server's. `/v1/apply_template` shows the prompt, its token ids and where
pictures go; `continue_final_message` with `prompt_logprobs` scores an answer that you wrote.
"""

from __future__ import annotations

import httpx2

from examples.picture import KEY, STAR, URL, data_url

QUESTION = [
    {"type": "image_url", "image_url": {"url": data_url(STAR)}},
    {"type": "text", "text": "What do you see?"},
]
ANSWERS = ("A large red star in the center.", "A large blue star in the center.")

with httpx2.Client(base_url=URL, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:

    def post(path: str, **body: object) -> dict:
        answer = http.post(path, json={"model": "model", **body})
        answer.raise_for_status()
        return answer.json()

    messages = [{"role": "user", "content": QUESTION}]
    prompt = post("/v1/apply_template", messages=messages)
    print(f"{len(prompt['token_ids'])} tokens, pictures at {prompt['spans']}")
    print(prompt["prompt"])
    for text in ANSWERS:
        scored = post(
            "/v1/chat/completions",
            messages=[*messages, {"role": "assistant", "content": text}],
            add_generation_prompt=False,
            continue_final_message=True,
            prompt_logprobs=0,
            max_tokens=1,
        )
        places = scored["prompt_logprobs"][len(prompt["token_ids"]) :]
        total = sum(next(iter(place.values()))["logprob"] for place in places)
        print(f"{total:8.2f}  {text}")
