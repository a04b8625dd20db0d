"""Evaluation harnesses' requests, as they send them, over a real LLM worker: the log-likelihoods
and answers are those of the unsplit model."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image

from opticnerve.config import GatewayConfig
from tests import llms
from tests.fakes import FakeEncoder, until
from tests.gateways import PAIR_ID, data_url, serving, stack, tokenizer
from tests.llms import Demo

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

CONTEXTS = ("The star is", "What is", "<|im_start|>user\nSpell OCEAN.<|im_end|>\n<|im_start|>")
CONTINUATIONS = (" red", " a large blue circle.", "assistant\nO C E A N")


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


@contextlib.asynccontextmanager
async def scored(directory: Path, **settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway over one real LLM worker."""
    async with llms.running(directory, **settings) as worker, FakeEncoder(pair_id=PAIR_ID) as eye:
        config = GatewayConfig(
            port=0,
            llm_addresses=(worker.server.address,),
            encoder_addresses=(eye.address,),
            drain_timeout_s=1.0,
        )
        async with serving(config) as (server, client):
            await until(lambda: not server.gateway.pipeline.pairing.missing())
            yield client


def likelihood(demo: Demo, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """(log-likelihood, whether it is the greedy continuation), by the unsplit model."""
    whole = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        rows = torch.log_softmax(demo.whole(input_ids=whole).logits[0].float(), dim=-1)
    rows = rows[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    total = rows.gather(1, targets.unsqueeze(1)).sum().item()
    return total, bool((rows.argmax(dim=-1) == targets).all())


def read_scores(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """As lm-evaluation-harness reads a choice: the last token is the one that was generated."""
    scores = choice["logprobs"]
    own = scores["token_logprobs"][context:-1]
    tops = scores["top_logprobs"][context:-1]
    greedy = all(each == max(top.values()) for each, top in zip(own, tops, strict=True))
    return sum(own), greedy


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [8, 2048])
async def test_loglikelihoods_as_lm_eval_asks_for_them(demo, tmp_path, chunk):
    pairs = [(c, a) for c in CONTEXTS for a in CONTINUATIONS]
    encoded = [(special(c), special(a)) for c, a in pairs]
    async with scored(tmp_path, max_num_batched_tokens=chunk) as client:
        asked = {"model": "model", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
        prompts = [[*context, *continuation] for context, continuation in encoded]
        texts = [c + a for c, a in pairs]
        for _ in range(2):  # The second time, every prefix could be cached.
            for prompt in (prompts, texts):
                body = {**asked, "prompt": prompt, "echo": True}
                told = (await client.post("/v1/completions", json=body)).json()
                choices = sorted(told["choices"], key=lambda choice: choice["index"])
                for choice, (context, continuation) in zip(choices, encoded, strict=True):
                    total, greedy = read_scores(choice, len(context))
                    right, best = likelihood(demo, context, continuation)
                    assert total == pytest.approx(right, abs=1e-3) and greedy == best
        body = {**asked, "prompt": prompts, "echo": True, "max_tokens": 0}
        told = (await client.post("/v1/completions", json=body)).json()
        for choice, (context, continuation) in zip(told["choices"], encoded, strict=True):
            total = sum(choice["logprobs"]["token_logprobs"][len(context) :])
            right, _ = likelihood(demo, context, continuation)
            assert total == pytest.approx(right, abs=1e-3)


def special(text: str) -> list[int]:
    """As lm-evaluation-harness's tokenizers encode a text: special tokens are special."""
    return tokenizer().encode(tokenizer().aliases.hide(text))


@pytest.mark.slow
async def test_generate_until_as_lm_eval_asks_for_it(demo, tmp_path):
    prompts = [special(CONTEXTS[2] + "assistant\n"), special("The star is")]
    async with scored(tmp_path) as client:
        info = (await client.get("/tokenizer_info")).json()
        body = {
            "prompt": prompts, "model": "model", "max_tokens": 12, "temperature": 0,
            "stop": ["\n\n", info["eos_token"]], "seed": 1234,
        }  # fmt: skip
        told = (await client.post("/v1/completions", json=body)).json()
        for choice, prompt in zip(told["choices"], prompts, strict=True):
            right = demo.reference(llms.Prompt(prompt, [], []), 12)
            text = tokenizer().decode(right, skip_special_tokens=True).partition("\n\n")[0]
            assert choice["text"] == text


TEXT = {"type": "text", "text": "What is this?"}
LM_EVAL = {"model": "model", "max_tokens": 256, "temperature": 0, "seed": 1234}
VLMEVAL = {"model": "model", "n": 1, "temperature": 0, "max_tokens": 2048}


def jpeg(**more: Any) -> dict[str, Any]:
    """A picture as VLMEvalKit sends it."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(buffer, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, **more}}


def by_user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


CHATS: dict[str, dict[str, Any]] = {
    "lm-eval": {
        "messages": [by_user(
            {"type": "image_url", "image_url": {"url": data_url(), "detail": "auto"}}, TEXT
        )],
        "stop": ["\n\n", "<|im_end|>"], **LM_EVAL,
    },
    "lm-eval, a text": {
        "messages": [{"role": "user", "content": "What is this?", "type": "text"}],
        "stop": [], **LM_EVAL,
    },
    "VLMEvalKit": {
        "messages": [{"role": "system", "content": "Be brief."}, by_user(TEXT, jpeg(detail="low"))],
        **VLMEVAL,
    },
    "VLMEvalKit, several turns": {
        "messages": [
            by_user(jpeg(detail="high"), jpeg(detail="high"), TEXT),
            {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
            by_user(TEXT),
        ],
        **VLMEVAL,
    },
    "VLMEvalKit, for LMDeploy": {
        "messages": [by_user(TEXT, jpeg(max_dynamic_patch=6))],
        **VLMEVAL, "max_tokens": 1024, "temperature": 0.0,
    },
    "NeMo Evaluator's check": {
        "model": "model", "max_tokens": 1,
        "messages": [{"role": "user", "content": "hello, what is your name?"}],
    },
    "NeMo Evaluator": {
        "model": "model", "messages": [{"role": "user", "content": "What?"}],
        "temperature": 1e-07, "top_p": 0.9999999, "max_tokens": 512,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
async def test_the_chats_of_evaluators(name):
    sent = CHATS[name]
    contents = [m["content"] for m in sent["messages"] if isinstance(m["content"], list)]
    pictures = [part for parts in contents for part in parts if part["type"] == "image_url"]
    async with stack() as s:
        if "LMDeploy" in name:  # It asks for the model's name first.
            listed = (await s.client.get("/v1/models")).json()
            sent = {**sent, "model": listed["data"][0]["id"]}
        answer = await s.client.post("/v1/chat/completions", json=sent)
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["message"]["content"]
        assert text and "Hello there.".startswith(text)
        (start,) = s.llm.starts
        assert len(start.spans) == len(pictures)
        assert start.sampling.max_tokens == sent["max_tokens"]
        assert start.sampling.temperature == sent.get("temperature", 1.0)


async def test_the_completions_of_nemo_evaluator():
    async with stack() as s:
        check = {"model": "model", "max_tokens": 1, "prompt": "hello, my name is"}
        assert (await s.client.post("/v1/completions", json=check)).status_code == 200
        asked = {"model": "model", "prompt": "What?", "temperature": 0.0, "max_tokens": 512}
        told = (await s.client.post("/v1/completions", json=asked)).json()
        assert told["choices"][0]["text"] == "Hello there."
