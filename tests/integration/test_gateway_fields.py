"""Fields of other servers and the gateway's own defaults, from the request to the LLM worker."""

import json

import pytest

from tests.gateways import stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]


async def test_defaults_of_the_gateway():
    given = json.dumps({"temperature": 0.25, "max_tokens": 2})
    async with stack(default_system_prompt="Be brief.", default_sampling=given) as s:
        rendered = (
            await s.client.post("/v1/apply_template", json={"messages": [user("Hi")]})
        ).json()
        assert "<|im_start|>system\nBe brief.<|im_end|>" in rendered["prompt"]
        await s.chat(user("Hi"))
        await s.chat(user("Hi"), temperature=0.5, max_tokens=1)
        assert list(s.llm.starts[0].token_ids) == rendered["token_ids"]
        sampling = [
            (start.sampling.temperature, start.sampling.max_tokens) for start in s.llm.starts
        ]
        assert sampling == [(0.25, 2), (0.5, 1)]
        assert "Be brief" not in (await s.client.get("/health")).text
