"""/v1/completions over real HTTP: text and token ids, whole and streamed, by OpenAI's client."""

import contextlib

import openai
import pytest

from tests.fakes import until
from tests.gateways import END, PAIR_ID, data_url, events, ids, stack, tokenizer, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

IMAGE = "<|image_pad|>"


async def complete(s, prompt="Once", **fields):
    body = {"model": "model", "prompt": prompt, **fields}
    return await s.client.post("/v1/completions", json=body)


@contextlib.asynccontextmanager
async def openai_client(s):
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    url = f"{s.client.base_url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:
        yield client


@pytest.mark.process  # The client asks the system what machine this is.
async def test_openais_client_gets_an_answer():
    async with stack() as s, openai_client(s) as client:
        told = await client.completions.create(model="model", prompt="Once", seed=7)
        assert told.object == "text_completion" and told.id.startswith("cmpl-")
        assert told.system_fingerprint == "fp_" + PAIR_ID[:12]
        (choice,) = told.choices
        assert (choice.index, choice.text, choice.finish_reason) == (0, "Hello there.", "stop")
        assert choice.logprobs is None
        start = s.llm.starts[0]
        assert list(start.token_ids) == ids("Once") and not start.spans
        assert (start.sampling.seed, start.sampling.max_tokens) == (7, 16)
        assert told.usage.prompt_tokens == len(start.token_ids)
        assert told.usage.completion_tokens == len(s.llm.tokens)
        assert s.idle()


@pytest.mark.process  # The client asks the system what machine this is.
async def test_openais_client_gets_a_stream():
    options = {"include_usage": True}
    async with stack() as s, openai_client(s) as client:
        stream = await client.completions.create(
            model="model", prompt=ids("Once"), stream=True, stream_options=options
        )
        *chunks, last = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello there."
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
            "stop"
        ]
        assert last.choices == [] and last.usage.total_tokens == len(ids("Once")) + len(
            s.llm.tokens
        )
        assert {chunk.object for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("stream", [True, False])
async def test_the_same_ids_have_the_same_answer_as_a_chat(stream):
    chat = {"messages": [user("What is this?")]}
    sampling = {"seed": 3, "temperature": 0.7, "max_tokens": 9, "stop": ["re"], "n": 2}
    async with stack() as s:
        rendered = (await s.client.post("/v1/apply_template", json=chat)).json()
        chats = await s.chat(*chat["messages"], stream=stream, **sampling)
        for prompt in (rendered["token_ids"], rendered["prompt"]):
            answer = await complete(s, prompt, stream=stream, **sampling)
            assert texts(answer, stream, "text") == texts(chats, stream, "content")
        ours, *others = s.llm.starts
        for start in others:
            assert start.token_ids == ours.token_ids and start.sampling == ours.sampling


def texts(answer, stream, field):
    """The text of each choice, in order."""
    bodies = events(answer.text)[:-1] if stream else [answer.json()]
    found = {}
    for choice in (choice for told in bodies for choice in told["choices"]):
        said = choice.get("delta") or choice.get("message") or choice
        found[choice["index"]] = found.get(choice["index"], "") + said[field]
    return [found[index] for index in sorted(found)]


async def test_special_tokens_of_a_text_are_special_but_those_of_pictures():
    async with stack() as s:
        assert (await complete(s, f"<|im_start|>user\n{IMAGE}")).status_code == 200
        sent = list(s.llm.starts[0].token_ids)
        assert sent[0] == tokenizer().id_of("<|im_start|>")
        assert tokenizer().id_of(IMAGE) not in sent
        assert tokenizer().decode(sent) == f"<|im_start|>user\n{IMAGE}"


async def test_ids_of_pictures_are_refused():
    chat = {"messages": [user("What?", data_url())]}
    async with stack() as s:
        rendered = (await s.client.post("/v1/apply_template", json=chat)).json()
        answer = await complete(s, rendered["token_ids"])
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "prompt")
        assert "/v1/chat/completions" in error["message"] and s.idle()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_and_timings(stream):
    async with stack(tokens=[*ids("one, two, three"), END]) as s:
        answer = await complete(s, stop=" two", stream=stream, timings=True)
        told = events(answer.text)[:-1] if stream else [answer.json()]
        choices = [choice for part in told for choice in part["choices"]]
        assert "".join(choice["text"] for choice in choices) == "one,"
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", " two")
        assert told[-1]["timings"]["total_ms"] > 0
        await until(s.idle)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": ["a", ""]}, None, "prompt[1]"),
        ({"prompt": ["a", 1]}, None, "prompt[1]"),
        ({"prompt": [[1], []]}, None, "prompt[1]"),
        ({"prompt": [[1], ["a"]]}, None, "prompt[1][0]"),
        ({"prompt": ["a"] * 2_000}, None, "prompt"),
        ({"prompt": ["a"] * 100, "n": 11}, None, "prompt"),
        ({"prompt": ["a", "a word, " * 100_000]}, "context_length_exceeded", "prompt[1]"),
        ({"prompt": {}}, None, "prompt"),
        ({"prompt": ""}, None, "prompt"),
        ({"prompt": []}, None, "prompt"),
        ({"prompt": None}, None, "prompt"),
        ({"prompt": [1, "a"]}, None, "prompt[1]"),
        ({"prompt": [-1]}, None, "prompt[0]"),
        ({"prompt": [1, 3.5]}, None, "prompt[1]"),
        ({"prompt": [10**6]}, None, None),
        ({"messages": []}, "unknown_field", "messages"),
        ({"suffix": "."}, "unsupported", "suffix"),
        ({"best_of": 2}, "unsupported", "best_of"),
        ({"logprobs": 21}, None, "logprobs"),
        ({"logprobs": True}, None, "logprobs"),
        ({"prompt_logprobs": 21}, None, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, None, "prompt_logprobs"),
        ({"max_tokens": 10**6}, "context_length_exceeded", "max_tokens"),
        ({"prompt": "a word, " * 100_000}, "context_length_exceeded", "prompt"),
        ({"prompt": [1] * 90_000}, "context_length_exceeded", "prompt"),
    ],
)
async def test_what_is_refused(fields, code, param):
    async with stack() as s:
        answer = await complete(s, **fields)
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert error["code"] == code and (param is None or error["param"] == param), error
        assert "messages" not in error["message"] or "messages" in fields


async def test_what_asks_for_nothing_is_accepted():
    neutral = {"echo": False, "suffix": "", "best_of": 1, "logprobs": None, "user": "u"}
    async with stack() as s:
        for prompt in (["Once"], [ids("Once")], [float(token) for token in ids("Once")]):
            assert (await complete(s, prompt, **neutral)).json()["choices"][0]["text"]
        assert all(list(start.token_ids) == ids("Once") for start in s.llm.starts)
