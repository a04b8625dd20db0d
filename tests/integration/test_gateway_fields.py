"""Fields of other servers and the gateway's own defaults, from the request to the LLM worker."""

import json

import pytest

from tests.fakes import until
from tests.gateways import END, data_url, events, ids, stack, user

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


async def complete(s, prompt, **fields):
    body = {"model": "model", "prompt": prompt, **fields}
    return await s.client.post("/v1/completions", json=body)


async def test_sampling_fields_reach_the_worker():
    fields = {
        "stop_token_ids": [5, 6],
        "logit_bias": {"7": -1.5},
        "bad_words": ["cat"],
        "allowed_token_ids": [8, 9, END],
        "min_tokens": 1,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
    }
    async with stack() as s:
        assert (await s.chat(user("Hi"), **fields)).status_code == 200
        assert (await complete(s, "Hi", **fields)).status_code == 200
        for sampling in (start.sampling for start in s.llm.starts):
            assert list(sampling.stop_token_ids) == [5, 6]
            assert dict(sampling.logit_bias) == {7: -1.5}
            words = [list(word.token_ids) for word in sampling.bad_words]
            assert words == [ids("cat"), ids(" cat")]
            assert list(sampling.allowed_token_ids) == [8, 9, END]
            assert (sampling.min_tokens, sampling.top_k, sampling.ignore_eos) == (1, 3, True)
            assert sampling.min_p == pytest.approx(0.1)
            assert sampling.repetition_penalty == 1.5


@pytest.mark.parametrize("stream", [True, False])
async def test_tokens_may_be_named_by_their_ids(stream):
    fields = {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}
    async with stack(tokens=[41, END]) as s:
        answer = await s.chat(user("Hi"), stream=stream, **fields)
        choices = [c for part in bodies(answer, stream) for c in part["choices"]]
        shown = [at for c in choices for at in (c["logprobs"] or {"content": []})["content"]]
        assert [at["token"] for at in shown] == ["token_id:41"]
        assert [top["token"] for top in shown[0]["top_logprobs"]] == ["token_id:41", "token_id:42"]
        assert bytes(shown[0]["bytes"]) == b"token_id:41"


def bodies(answer, stream):
    return events(answer.text)[:-1] if stream else [answer.json()]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2])
async def test_echo_begins_with_the_message_that_is_continued(stream, n):
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    for content, shown in (("It says", "It says"), (parts, "One\ntwo")):
        chat = user("Hi"), {"role": "assistant", "content": content}
        fields = {"continue_final_message": True, "add_generation_prompt": False, "n": n}
        async with stack() as s:
            for echo, begin in ((True, shown), (False, "")):
                answer = await s.chat(*chat, stream=stream, echo=echo, **fields)
                assert texts(answer, stream) == dict.fromkeys(range(n), f"{begin}Hello there.")
            answer = await s.chat(user("Hi"), stream=stream, echo=True)
            assert texts(answer, stream) == {0: "Hello there."}


def texts(answer, stream):
    """The text of each choice."""
    found = {}
    for choice in (choice for part in bodies(answer, stream) for choice in part["choices"]):
        said = choice["delta" if stream else "message"]
        found[choice["index"]] = found.get(choice["index"], "") + said["content"]
    return found


async def test_documents_without_effect_are_named():
    documents = [{"title": "A", "text": "one"}]
    template = "{% for d in documents or [] %}{{ d.text }}{% endfor %}{{ messages[0].content }}"
    async with stack() as s:
        answer = await s.chat(user("Hi"), documents=documents)
        assert answer.headers["x-opticnerve-warnings"] == "without effect: documents"
        answer = await s.chat(user("Hi"), documents=[{"text": 1}])
        assert answer.json()["error"]["param"] == "documents[0].text"
    async with stack(chat_template=template) as s:
        chat = {"messages": [{"role": "user", "content": "Hi"}], "documents": documents}
        answer = await s.client.post("/v1/apply_template", json=chat)
        assert answer.json()["prompt"] == "oneHi"
        assert "x-opticnerve-warnings" not in answer.headers


# ---- truncated prompts


async def test_a_prompt_is_truncated_to_its_last_or_first_tokens():
    whole = ids("one two three four five")
    async with stack() as s:
        for prompt in (whole, "one two three four five"):
            for side, kept in ((None, whole[-3:]), ("left", whole[-3:]), ("right", whole[:3])):
                fields = {"truncation_side": side, "truncate_prompt_tokens": 3}
                answer = await complete(s, prompt, **fields)
                assert list(s.llm.starts[-1].token_ids) == kept
                assert answer.json()["usage"]["prompt_tokens"] == 3
        await complete(s, whole, truncate_prompt_tokens=500)
        assert list(s.llm.starts[-1].token_ids) == whole


async def test_a_chat_is_truncated_to_what_fits():
    chat = user("one two " * 2500)
    async with stack() as s:
        room = s.llm.max_model_len
        assert (await s.chat(chat)).json()["error"]["code"] == "context_length_exceeded"
        for given, asked, kept in (
            ({"max_tokens": 100}, -1, room - 100),
            ({}, -1, room - 1),
            ({"max_tokens": 5}, 1000, 1000),
        ):
            answer = await s.chat(chat, truncate_prompt_tokens=asked, **given)
            assert answer.status_code == 200, answer.text
            assert len(s.llm.starts[-1].token_ids) == kept
        answer = await s.chat(chat, truncate_prompt_tokens=room + 1)
        assert answer.json()["error"]["param"] == "truncate_prompt_tokens"
        answer = await s.chat(user("one two " * 200_000), truncate_prompt_tokens=-1)
        assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_pictures_are_kept_whole_or_the_prompt_is_refused():
    before, after = user("one two three four"), user("five six seven", data_url())
    async with stack() as s:
        await s.chat(before, after)
        start = s.llm.starts[0]
        (span,) = start.spans
        total, least = len(start.token_ids), len(start.token_ids) - span.token_offset
        answer = await s.chat(before, after, truncate_prompt_tokens=least)
        assert answer.status_code == 200
        assert s.llm.starts[1].token_ids == start.token_ids[total - least :]
        assert s.llm.starts[1].spans[0].token_offset == 0
        answer = await s.chat(before, after, truncate_prompt_tokens=least - 1)
        assert answer.json()["error"]["param"] == "truncate_prompt_tokens"
        await until(s.idle)


# ---- token ids


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stop", [None, "re."])
async def test_token_ids_of_a_chat(stream, stop):
    written = [*ids("Hello there."), END]
    kept = written if stop is None else written[: len(ids("Hello there."))]
    fields = {"return_token_ids": True, "n": 2, "stop": stop, "stream": stream}
    async with stack(tokens=written) as s:
        told = bodies(await s.chat(user("Hi", data_url()), **fields), stream)
        assert told[0]["prompt_token_ids"] == list(s.llm.starts[0].token_ids)
        assert not any("prompt_token_ids" in part for part in told[1:])
        found = {}
        for choice in (choice for part in told for choice in part["choices"]):
            found[choice["index"]] = found.get(choice["index"], []) + choice.get("token_ids", [])
        assert found == {0: kept, 1: kept}
        told = bodies(await s.chat(user("Hi"), stream=stream), stream)
        assert "token_ids" not in str(told)


@pytest.mark.parametrize("stream", [True, False])
async def test_token_ids_of_completions(stream):
    prompts = [ids("One"), ids("One two")]
    fields = {"return_token_ids": True, "n": 2, "stream": stream}
    async with stack() as s:
        told = bodies(await complete(s, prompts, **fields), stream)
        shown, found = {}, {}
        for choice in (choice for part in told for choice in part["choices"]):
            index = choice["index"]
            found[index] = found.get(index, []) + choice["token_ids"]
            if "prompt_token_ids" in choice:
                assert index not in shown
                shown[index] = choice["prompt_token_ids"]
        assert shown == {0: prompts[0], 1: prompts[0], 2: prompts[1], 3: prompts[1]}
        assert found == dict.fromkeys(range(4), s.llm.tokens)


async def test_the_prompts_ids_count_in_each_choice_of_an_answer():
    prompt, fields = [100] * 500, {"return_token_ids": True, "n": 8}
    async with stack(max_answer_bytes=8 * 1800) as s:
        answer = await complete(s, prompt, **fields)
        assert answer.status_code == 400, len(answer.content)
        assert answer.json()["error"]["code"] == "answer_too_large"
        assert (await complete(s, prompt, **fields | {"n": 6})).status_code == 200
        await until(s.idle)
