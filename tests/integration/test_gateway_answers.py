"""Answers over real HTTP, whole and streamed, with scripted workers behind."""

import asyncio
import gc
import json

import pytest

from gateway.api import sse
from gateway.api.chat import ChatRequest
from gateway.job import ChatPrompt
from gateway.output.choices import Choices
from tests.fakes import until
from tests.gateways import END, PAIR_ID, body, events, ids, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]


async def test_a_whole_answer():
    async with stack() as s:
        answer = await s.chat(user("What?"), seed=7, max_tokens=20, temperature=0.5)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["object"] == "chat.completion" and told["model"] == "model"
        assert told["id"].startswith("chatcmpl-")
        assert told["system_fingerprint"] == "fp_" + PAIR_ID[:12]
        (choice,) = told["choices"]
        assert choice["message"] == {
            "role": "assistant", "content": "Hello there.", "refusal": None
        }  # fmt: skip
        assert choice["finish_reason"] == "stop"
        start = s.llm.starts[0]
        assert told["usage"]["prompt_tokens"] == len(start.token_ids)
        assert told["usage"]["completion_tokens"] == len(s.llm.tokens)
        assert (start.sampling.seed, start.sampling.max_tokens) == (7, 20)
        assert list(start.sampling.eos_token_ids) == [END]
        assert "timings" not in told
        assert s.idle()


async def test_a_streamed_answer():
    async with stack() as s:
        answer = await s.chat(stream=True, stream_options={"include_usage": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *chunks, last, done = events(answer.text)
        assert done == "[DONE]"
        assert last["choices"] == [] and last["usage"]["total_tokens"] > 0
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == "Hello there."
        assert all(chunk["usage"] is None for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_stream_without_usage_has_a_choice_in_every_chunk():
    async with stack() as s:
        *chunks, done = events((await s.chat(stream=True)).text)
        assert done == "[DONE]" and all(len(chunk["choices"]) == 1 for chunk in chunks)


RUNNING = {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize("stop", [None, " there"])
async def test_usage_in_every_chunk(stop):
    async with stack() as s:
        s.llm.cached_tokens = 3
        answer = await s.chat(user("What?"), stream=True, stream_options=RUNNING, stop=stop)
        *chunks, last, done = events(answer.text)
        assert done == "[DONE]" and last["choices"] == [] and len(chunks) > 2
        prompt = len(s.llm.starts[0].token_ids)
        for chunk in (*chunks, last):
            usage = chunk["usage"]
            assert usage["prompt_tokens"] == prompt
            assert usage["total_tokens"] == prompt + usage["completion_tokens"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": 3, "image_tokens": 0}
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts[0] == 0 and "role" in chunks[0]["choices"][0]["delta"]
        assert counts == sorted(counts) and counts[1] > 0
        texts = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
        written = len(ids("Hello there" if stop else "Hello there.")) + (not stop)
        assert "".join(texts) == ("Hello" if stop else "Hello there.")
        assert counts[-1] == written and last["usage"] == chunks[-1]["usage"]


async def test_usage_in_every_chunk_is_of_all_choices():
    async with stack(tokens=[*ids("a b c"), END]) as s:
        answer = await s.chat(stream=True, stream_options=RUNNING, n=3, temperature=1.0)
        *chunks, last, _ = events(answer.text)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[0] == 0
        assert last["usage"]["completion_tokens"] == counts[-1] == 3 * len(s.llm.tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": None},
    ],
)
async def test_usage_in_chunks_goes_with_usage_at_the_end(fields):
    async with stack() as s:
        answer = await s.chat(**fields)
        assert not any("usage" in chunk for chunk in events(answer.text)[:-1])
        told = fields["stream_options"] and "stream_options.continuous_usage_stats"
        named = f"without effect: {told}" if told else None
        assert answer.headers.get("x-opticnerve-warnings") == named


@pytest.mark.parametrize("options", [RUNNING, {}, {"include_usage": None}])
async def test_options_of_streams_do_nothing_to_whole_answers(options):
    async with stack() as s:
        answer = await s.chat(stream_options=options)
        assert answer.status_code == 200 and "x-opticnerve-warnings" not in answer.headers
        assert answer.json()["usage"]["completion_tokens"] == len(s.llm.tokens)


async def test_what_the_worker_is_asked_for():
    async with stack() as s:
        answer = await s.chat(top_p=0, max_tokens=-1, seed=5.0, n=2.0, top_k=None, stop=[""])
        assert answer.status_code == 200
        start = s.llm.starts[0]
        sampling = start.sampling
        assert (sampling.temperature, sampling.seed, sampling.n) == (0, 5, 2)
        assert sampling.max_tokens == s.llm.max_model_len - len(start.token_ids)


async def test_characters_are_never_cut():
    text = "Grüße, 世界 🙂"
    async with stack(tokens=[*ids(text), END]) as s:
        *chunks, _ = events((await s.chat(stream=True)).text)
        pieces = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
        assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_ends_the_generation(stream):
    async with stack(tokens=ids("one, two, three, four")) as s:
        after = asyncio.Event()

        async def hold(fake, index):
            if index == len(ids("one, two, three")) + 1:
                await after.wait()  # Never set: without a cancel the answer would not come.

        s.llm.step = hold
        s.llm.cached_tokens = 7
        options = {"stream_options": {"include_usage": True}} if stream else {}
        answer = await s.chat(stop=[" three"], stream=stream, **options)
        if stream:
            *chunks, told, _ = events(answer.text)
            usage = told["usage"]
            text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
            last = chunks[-1]["choices"][0]
        else:
            last = answer.json()["choices"][0]
            text = last["message"]["content"]
            usage = answer.json()["usage"]
        assert usage["completion_tokens"] == len(ids("one, two, three"))
        assert usage["prompt_tokens_details"]["cached_tokens"] == 7
        assert (text, last["finish_reason"], last["stop_reason"]) == ("one, two,", "stop", " three")
        await until(s.idle)


async def test_several_choices_with_stop_strings_and_natural_ends():
    async with stack(tokens=[*ids("a b c"), END]) as s:
        told = (await s.chat(n=3, temperature=1.0)).json()
        assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
        assert {choice["message"]["content"] for choice in told["choices"]} == {"a b c"}
        assert told["usage"]["completion_tokens"] == 3 * len(s.llm.tokens)


@pytest.mark.parametrize("stream", [True, False])
async def test_choices_that_outlive_their_worker(stream, monkeypatch):
    """One has met a stop string, one has ended, one goes on; nothing is lost or doubled."""
    texts = ["one, two, three, four, five, six", "one, two", "a, b, c, d, e, f, g, h"]
    expected = [texts[0], texts[1], "a, b"]
    async with stack(llms=2) as s:
        died = []

        async def die(fake, index):
            if index == len(ids("a, b, c, d")) and not died:
                died.append(fake)
                await until(lambda: len(seen) == index)
                await fake.die()

        seen = taken(monkeypatch)
        for fake in s.llms:
            fake.others = {i: [*ids(text), END] for i, text in enumerate(texts)}
            fake.step = die
        fields = {"n": 3, "stop": [", c"], "logprobs": True}
        answer = await s.chat(stream=stream, **fields)
        chunks = events(answer.text)[:-1] if stream else [answer.json()]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        part = "delta" if stream else "message"
        for index, text in enumerate(expected):
            mine = [choice for choice in choices if choice["index"] == index]
            assert "".join(choice[part].get("content", "") for choice in mine) == text
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
            logprobs = [e["token"] for c in mine if c["logprobs"] for e in c["logprobs"]["content"]]
            assert "".join(logprobs) == text + (", c" if index == 2 else "")
        (again,) = next(fake for fake in s.llms if fake is not died[0]).starts
        assert {o.choice for o in again.outputs if o.finished} == {1, 2}
        counts = [len(ids(texts[0])) + 1, len(ids(texts[1])) + 1, len(ids("a, b, c"))]
        if not stream:
            assert answer.json()["usage"]["completion_tokens"] == sum(counts)


def taken(monkeypatch):
    """The tokens of choice 0 that have reached the gateway, while they come."""
    seen = []
    take = Choices.take

    def spy(choices, delta):
        if delta.choice == 0:
            seen.extend(delta.token_ids)
        return take(choices, delta)

    monkeypatch.setattr(Choices, "take", spy)
    return seen


async def test_logprobs():
    async with stack(tokens=[*ids("ab"), END]) as s:
        told = (await s.chat(logprobs=True, top_logprobs=2)).json()
        content = told["choices"][0]["logprobs"]["content"]
        assert "".join(token["token"] for token in content) == "ab"
        assert all(len(token["top_logprobs"]) == 2 for token in content)
        assert content[0]["bytes"] == list(content[0]["token"].encode())


async def test_finish_by_length():
    async with stack() as s:
        told = (await s.chat(max_tokens=3)).json()
        assert told["choices"][0]["finish_reason"] == "length"
        assert told["usage"]["completion_tokens"] == 3


async def test_a_large_answer_is_written_in_small_pieces(monkeypatch):
    """While a megabyte of JSON is written in one go, no other request is served."""
    sizes = []

    def encode(body, encode=sse._encode):
        text = encode(body)
        sizes.append(len(text))
        return text

    monkeypatch.setattr(sse, "_encode", encode)
    tokens = [*ids("Hello there. ") * 40, END]
    async with stack(tokens=tokens) as s:
        answer = await s.chat(n=4, logprobs=True, top_logprobs=20)
        told = answer.json()
        assert len(answer.content) > 500_000 and max(sizes) < 5_000
        assert int(answer.headers["content-length"]) == len(answer.content)
        for choice in told["choices"]:
            assert len(choice["logprobs"]["content"]) == len(tokens) - 1
        streamed = await s.chat(logprobs=True, top_logprobs=20, stream=True)
        content = [
            token
            for event in events(streamed.text)[:-1]
            for token in (event["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        assert content == told["choices"][3]["logprobs"]["content"]


async def test_an_answer_is_kept_up_to_a_limit():
    fields = {"n": 2, "logprobs": True, "top_logprobs": 20}
    async with stack(tokens=[*ids("Hello there. ") * 40, END], max_answer_bytes=50_000) as s:
        answer = await s.chat(**fields)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "answer_too_large" and "--max-answer-bytes" in error["message"]
        await until(s.idle)
        assert (await s.chat(**fields, stream=True)).text.endswith("[DONE]\n\n")
    async with stack(tokens=[*ids("Hello there. ") * 40, END], max_bytes_in_flight=50_000) as s:
        assert (await s.chat(**fields)).status_code == 429
        await until(s.idle)


async def test_a_large_answer_counts_as_bytes_in_flight_until_its_client_has_it():
    payload = json.dumps(body(n=4, logprobs=True, top_logprobs=20)).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    sent, asked, go, gone = [], asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def receive():
        if not asked.is_set():
            asked.set()
            return {"type": "http.request", "body": payload}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if message.get("body"):
            await go.wait()

    async with stack(tokens=[*ids("Hello there. ") * 40, END]) as s:
        answering = asyncio.create_task(s.server.config.app(scope, receive, send))
        await until(lambda: len(sent) == 2)
        length = int(dict(sent[0]["headers"])[b"content-length"])
        assert len(sent[1]["body"]) < length / 4
        assert s.gateway.admission.bytes.held > length * 0.9
        go.set()
        await answering
        assert sum(len(message.get("body", b"")) for message in sent) == length
        await until(s.idle)


@pytest.mark.parametrize("stream", [True, False])
async def test_nothing_of_the_messages_stays_while_the_answer_is_written(stream):
    """Base64 in them may be most of what a request holds."""
    go = asyncio.Event()
    async with stack() as s:
        s.llm.step = lambda fake, index: go.wait()
        answer = asyncio.create_task(s.chat(user("What?"), stream=stream))
        await s.llm.started.wait()
        assert s.gateway.admission.bytes.held == 0
        gc.collect()
        kept = [held for held in gc.get_objects() if type(held) in (ChatRequest, ChatPrompt)]
        assert kept == []
        go.set()
        assert (await answer).status_code == 200
