"""Anthropic's Messages API over real HTTP: answers, streams, counts, keys and errors."""

import asyncio
import json

import pytest

from tests import vocabularies as v
from tests.fakes import until
from tests.gateways import DEADLINES_S, END, data_url, ids, keys_of, stack, tokenizer, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

PATH = "/v1/messages"
DATA = data_url().partition(",")[2]
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
QUESTION = {"role": "user", "content": [PICTURE, {"type": "text", "text": "What?"}]}


async def ask(s, *messages, path=PATH, headers=None, **fields):
    sent = {"model": "model", "messages": list(messages) or [QUESTION], **fields}
    if path == PATH:
        sent = {"max_tokens": 20, **sent}
    return await s.client.post(path, json=sent, headers=headers)


def events(text):
    """(name, data) of every event of a stream."""
    blocks = [block.split("\n") for block in text.removesuffix("\n\n").split("\n\n")]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in blocks
    ]


def failed(answer):
    """The error of an answer in Anthropic's shape."""
    told = answer.json()
    assert told["type"] == "error" and told["request_id"] == answer.headers["request-id"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    return told["error"]


async def test_an_answer_is_that_of_the_same_chat():
    async with stack() as s:
        s.llm.cached_tokens = 5
        answer = await ask(s, system="Be brief.", temperature=0.5, top_k=7)
        told = answer.json()
        assert answer.status_code == 200 and answer.headers["request-id"].startswith("req-")
        assert told["content"] == [{"type": "text", "text": "Hello there."}]
        assert (told["stop_reason"], told["model"]) == ("end_turn", "model")
        brief = {"role": "system", "content": "Be brief."}
        chat = await s.chat(brief, user("What?", data_url()), temperature=0.5, top_k=7)
        ours, theirs = s.llm.starts
        assert ours.token_ids == theirs.token_ids and ours.spans == theirs.spans
        assert (ours.sampling.temperature, ours.sampling.top_k) == (0.5, 7)
        assert ours.sampling.max_tokens == 20 and len(s.encoder.calls) == 1
        usage, known = told["usage"], chat.json()["usage"]
        assert usage["cache_read_input_tokens"] == 5
        assert usage["input_tokens"] == known["prompt_tokens"] - 5
        assert usage["output_tokens"] == known["completion_tokens"]
        assert s.idle()


async def test_a_stream_has_anthropics_events():
    async with stack() as s:
        answer = await ask(s, stream=True, headers={"x-opticnerve-timings": "1"})
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = events(answer.text)
        assert all(name == data["type"] for name, data in told)
        names = [name for name, _ in told]
        assert names[:2] == ["message_start", "content_block_start"]
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        text = [data["delta"]["text"] for name, data in told if name == "content_block_delta"]
        assert "".join(text) == "Hello there." and len(text) > 1
        start, delta = told[0][1]["message"], told[-2][1]
        count = (await ask(s, path=f"{PATH}/count_tokens")).json()
        assert start["usage"]["input_tokens"] == count["input_tokens"]
        assert delta["usage"]["output_tokens"] == len(s.llm.tokens)
        assert delta["timings"]["total_ms"] > 0
        await until(s.idle)


async def test_a_stop_sequence():
    async with stack(tokens=[*ids("one, two, three"), END]) as s:
        told = (await ask(s, stop_sequences=[" two", "x"])).json()
        assert told["content"][0]["text"] == "one,"
        assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", " two")


async def test_the_assistants_last_words_are_continued():
    prefill = {"role": "assistant", "content": "It is a"}
    async with stack() as s:
        assert (await ask(s, QUESTION, prefill)).status_code == 200
        assert tokenizer().decode(list(s.llm.starts[0].token_ids)).endswith("It is a")


async def test_tokens_are_counted_without_an_encoder_or_a_generation():
    async with stack() as s:
        answer = await ask(s, path=f"{PATH}/count_tokens/")
        assert answer.status_code == 200 and not s.llm.starts and not s.encoder.calls
        assert (await ask(s)).json()["usage"]["input_tokens"] == answer.json()["input_tokens"]
        assert s.idle()


async def test_the_header_of_betas_has_no_effect():
    headers = {"anthropic-beta": "a-2025-01-01", "anthropic-version": "2023-06-01"}
    async with stack() as s:
        for path in (PATH, f"{PATH}/count_tokens"):
            answer = await ask(s, path=path, headers=headers)
            told = answer.headers["x-opticnerve-warnings"]
            assert answer.status_code == 200 and told == "without effect: the header anthropic-beta"


async def test_an_answer_of_a_given_form():
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}}
    async with stack() as s:
        for form in ("output_config", "output_format"):
            given = {"type": "json_schema", "schema": schema}
            given = {"format": given} if form == "output_config" else given
            assert (await ask(s, **{form: given})).status_code == 200
        first, second = (start.sampling.grammar for start in s.llm.starts)
        assert first == second and "Oslo" in first
        bad = {"format": {"type": "json_schema", "schema": {"type": "nope"}}}
        answer = await ask(s, output_config=bad)
        assert answer.status_code == 400
        assert failed(answer)["details"]["param"] == "output_config.format.schema"


async def test_what_a_template_has_no_variable_for_is_named():
    asked = {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}
    template = "{{ enable_thinking }} {{ reasoning_effort }}: {{ messages[0].content }}"
    words = {"role": "user", "content": "Why?"}
    async with stack(encoders=0, chat_template=template) as s:
        answer = await ask(s, words, **asked)
        assert "x-opticnerve-warnings" not in answer.headers
        assert tokenizer().decode(list(s.llm.starts[0].token_ids)) == "False low: Why?"
    async with stack(encoders=0) as s:
        told = (await ask(s, words, **asked)).headers["x-opticnerve-warnings"]
        assert "thinking (the chat template" in told and "output_config.effort" in told


async def test_keys_come_in_either_header():
    async with stack(keys=keys_of(ada="sk-ada")) as s:
        for headers, status in (
            ({"x-api-key": "sk-ada"}, 200),
            ({"authorization": "Bearer sk-ada"}, 200),
            ({"x-api-key": "sk-ada", "authorization": "Bearer none"}, 200),
            ({"x-api-key": "sk-eve"}, 401),
            ({}, 401),
        ):
            answer = await ask(s, headers=headers)
            assert answer.status_code == status
            if status == 401:
                assert failed(answer)["type"] == "authentication_error"
            assert (await s.chat(headers=headers)).status_code == status
        assert "www-authenticate" in answer.headers


async def test_pages_may_send_the_key():
    async with stack(cors_origins=("https://a.example",), keys=keys_of(ada="sk-ada")) as s:
        asked = {
            "origin": "https://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "x-api-key, anthropic-version",
        }
        answer = await s.client.options(PATH, headers=asked)
        assert answer.status_code == 200
        assert "x-api-key" in answer.headers["access-control-allow-headers"]
        answer = await ask(s, headers={"origin": "https://a.example", "x-api-key": "sk-ada"})
        assert "request-id" in answer.headers["access-control-expose-headers"]


async def test_every_error_on_these_paths_has_anthropics_shape():
    settings = {"max_request_bytes": 5000, "max_concurrent_requests": 1, "worker_wait_s": 0.1}
    async with stack(**settings) as s:
        get = await s.client.get(PATH)
        assert get.status_code == 405 and failed(get)["type"] == "invalid_request_error"
        unserved = await s.client.post(f"{PATH}/batches", json={})
        assert unserved.status_code == 404 and failed(unserved)["type"] == "not_found_error"
        large = await ask(s, {"role": "user", "content": "x" * 6000})
        assert large.status_code == 413 and failed(large)["type"] == "request_too_large"
        other = await ask(s, model="other")
        assert other.status_code == 404 and failed(other)["type"] == "not_found_error"
        wrong = await ask(s, temperature="hot")
        assert failed(wrong)["details"] == {"error_code": None, "param": "temperature"}
        page = await ask(s, headers={"origin": "https://evil.example"})
        assert page.status_code == 403 and failed(page)["type"] == "permission_error"
        go = asyncio.Event()
        s.llm.step = lambda fake, index: go.wait()
        first = asyncio.create_task(ask(s))
        await until(lambda: s.llm.running == 1)
        full = await ask(s)
        assert full.status_code == 429 and failed(full)["type"] == "rate_limit_error"
        assert full.headers["retry-after"]
        go.set()
        assert (await first).status_code == 200
        openai = await s.client.post("/v1/messages2", json={})
        assert openai.json()["error"]["type"] == "not_found_error" and "type" not in openai.json()
        assert "request-id" not in openai.headers


async def test_a_failure_after_the_stream_began_is_an_event():
    for seconds in DEADLINES_S:
        async with stack(request_timeout_s=seconds) as s:
            s.llm.step = lambda fake, index: asyncio.Event().wait() if index else asyncio.sleep(0)
            answer = await ask(s, stream=True)
        if answer.status_code != 504:  # Before the stream began.
            break
    name, told = events(answer.text)[-1]
    assert answer.status_code == 200 and name == "error"
    assert told["error"]["type"] == "timeout_error"
    assert told["request_id"] == answer.headers["request-id"]


async def test_a_stream_that_outlasts_the_drain_ends_with_an_event():
    async with stack(drain_timeout_s=0.2) as s:
        s.llm.step = lambda fake, index: asyncio.Event().wait() if index else asyncio.sleep(0)
        sent = {"model": "model", "messages": [QUESTION], "max_tokens": 9, "stream": True}
        async with s.client.stream("POST", PATH, json=sent) as begun:
            text = aiter(begun.aiter_text())
            parts = [await anext(text)]
            s.server.running.stop()
            parts += [part async for part in text]
    name, told = events("".join(parts))[-1]
    assert name == "error" and told["error"]["type"] == "overloaded_error"
    assert "stopping" in told["error"]["message"]


async def test_the_answer_is_as_long_as_the_context_allows():
    async with stack() as s:
        told = (await ask(s, max_tokens=10**6)).json()
        left = s.llm.max_model_len - told["usage"]["input_tokens"]
        assert s.llm.starts[0].sampling.max_tokens == left
        long = {"role": "user", "content": "a word, " * 10_000}
        answer = await ask(s, long)
        assert answer.status_code == 400
        assert failed(answer)["details"]["error_code"] == "context_length_exceeded"


WORDS = {"role": "user", "content": "And in Oslo?"}
WEATHER = {"name": "weather", "input_schema": {"type": "object"}}
ANSWER = (
    "<think>\nRain?\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
)


def thinking_caller():
    """A model whose answer has thinking, text and a call."""
    return stack(
        tokens=[*ids(ANSWER), END], encoders=0, chat_template=v.HERMES, reasoning_parser="think"
    )


async def test_calls_and_their_results():
    async with thinking_caller() as s:
        told = (await ask(s, WORDS, tools=[WEATHER], max_tokens=200)).json()
        thought, said, called = told["content"]
        assert (thought["thinking"].strip(), said["text"].strip()) == ("Rain?", "I look.")
        assert called["id"].startswith("toolu_") and told["stop_reason"] == "tool_use"
        assert (called["name"], called["input"]) == ("weather", {"city": "Oslo"})
        result = {"type": "tool_result", "tool_use_id": called["id"], "content": "Rain."}
        turns = [
            {"role": "assistant", "content": told["content"]},
            {"role": "user", "content": [result]},
        ]
        assert (await ask(s, WORDS, *turns, tools=[WEATHER])).status_code == 200
        first, second = (tokenizer().decode(list(start.token_ids)) for start in s.llm.starts)
        assert '"weather"' in first and "Rain." not in first
        assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in second and "Rain." in second
        unseen = await ask(s, WORDS, tools=[WEATHER], tool_choice={"type": "none"})
        assert [block["type"] for block in unseen.json()["content"]] == ["thinking", "text"]
        assert '"weather"' not in tokenizer().decode(list(s.llm.starts[2].token_ids))


async def test_calls_that_must_be_made_are_constrained():
    async with thinking_caller() as s:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
            assert (await ask(s, WORDS, **fields)).json()["stop_reason"] == "tool_use"
        assert all("weather" in start.sampling.grammar for start in s.llm.starts)


async def test_a_stream_of_calls_is_the_whole_answer():
    fields = {"tools": [WEATHER], "max_tokens": 200}
    async with thinking_caller() as s:
        whole = (await ask(s, WORDS, **fields)).json()
        told = events((await ask(s, WORDS, **fields, stream=True)).text)
        starts = [data["content_block"] for name, data in told if name == "content_block_start"]
        kinds = [block["type"] for block in whole["content"]]
        assert [block["type"] for block in starts] == kinds == ["thinking", "text", "tool_use"]
        deltas = [data["delta"] for name, data in told if name == "content_block_delta"]
        parts = [delta.get("partial_json", "") for delta in deltas]
        assert (
            json.loads("".join(parts)) == whole["content"][-1]["input"]
            and sum(map(bool, parts)) > 2
        )
        assert told[-2][1]["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"


async def test_thinking_may_be_left_out():
    async with thinking_caller() as s:
        thinking = {"type": "adaptive", "display": "omitted"}
        told = (await ask(s, WORDS, tools=[WEATHER], thinking=thinking, max_tokens=200)).json()
        assert [block["type"] for block in told["content"]] == ["text", "tool_use"]
