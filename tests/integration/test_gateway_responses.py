"""/v1/responses over real HTTP: whole and streamed, by OpenAI's client."""

import asyncio
import base64
import contextlib
import dataclasses
import gc
import json

import openai
import pydantic
import pytest

from gateway.api.responses.request import ResponsesRequest
from gateway.job import CallMode, ChatPrompt, FormatKind
from gateway.output.events import (
    ChoiceEnd,
    End,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from gateway.pipeline import Pipeline
from opticnerve.errors import EngineFailure
from opticnerve.generation.values import Usage
from tests import vocabularies
from tests.fakes import until
from tests.gateways import END as IM_END
from tests.gateways import PAIR_ID, data_url, ids, keys_of, stack, tokenizer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

MODEL = {"model": "model"}


async def ask(s, items="What?", **fields):
    return await s.client.post("/v1/responses", json={**MODEL, "input": items, **fields})


@contextlib.asynccontextmanager
async def openai_client(s):
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    url = f"{s.client.base_url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:
        yield client


def told(answer):
    """The data of every event of a stream."""
    lines = answer.text.split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


@pytest.mark.process  # The client asks the system what machine this is.
async def test_openais_client_gets_a_response():
    async with stack() as s, openai_client(s) as client:
        response = await client.responses.create(
            input="What?", instructions="Be brief.", max_output_tokens=9, store=False, **MODEL
        )
        assert response.id.startswith("resp_") and response.status == "completed"
        assert response.output_text == "Hello there." and response.store is False
        assert response.system_fingerprint == "fp_" + PAIR_ID[:12]
        start = s.llm.starts[0]
        assert start.sampling.max_tokens == 9
        assert response.usage.input_tokens == len(start.token_ids)
        assert response.usage.output_tokens == len(s.llm.tokens)
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
        assert (await s.chat(*chat)).status_code == 200
        assert s.llm.starts[1].token_ids == start.token_ids
        assert s.idle()


@pytest.mark.process  # The client asks the system what machine this is.
async def test_openais_client_gets_streams():
    async with stack() as s, openai_client(s) as client:
        stream = await client.responses.create(input="What?", stream=True, **MODEL)
        events = [event async for event in stream]
        assert [event.type for event in events[:4]] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == "Hello there." and len(deltas) > 1
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == "Hello there."
        async with client.responses.stream(input="What?", **MODEL) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert final.output_text == "Hello there." and final.usage.output_tokens == len(
            s.llm.tokens
        )
        await until(s.idle)


@pytest.mark.process  # The client asks the system what machine this is.
async def test_openais_client_sends_the_answer_back():
    async with stack() as s, openai_client(s) as client:
        items = [{"role": "user", "content": "What?"}]
        response = await client.responses.create(input=items, **MODEL)
        items += [item.model_dump() for item in response.output]
        items += [{"role": "user", "content": "Sure?"}]
        assert (await client.responses.create(input=items, **MODEL)).output_text
        chat = [{"role": "user", "content": "What?"},
                {"role": "assistant", "content": "Hello there."},
                {"role": "user", "content": "Sure?"}]  # fmt: skip
        await s.chat(*chat)
        assert s.llm.starts[1].token_ids == s.llm.starts[2].token_ids


@contextlib.asynccontextmanager
async def picture_server():
    """The URL of a picture."""
    data = base64.b64decode(data_url("blue", (112, 56)).partition(",")[2])

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a.png"


@pytest.mark.parametrize("stream", [True, False])
async def test_pictures_by_data_and_by_url(stream):
    async with stack(allow_private_media=True) as s, picture_server() as url:
        parts = [{"type": "input_image", "image_url": at, "detail": "auto"}
                 for at in (data_url(), url)]  # fmt: skip
        parts += [{"type": "input_text", "text": "What?"}]
        answer = await ask(s, [{"role": "user", "content": parts}], stream=stream)
        assert answer.status_code == 200, answer.text
        response = told(answer)[-1]["response"] if stream else answer.json()
        start = s.llm.starts[0]
        tokens = sum(span.num_tokens for span in start.spans)
        assert len(start.items) == 2 and tokens > 2
        assert response["usage"]["input_tokens_details"]["image_tokens"] == tokens
        assert response["output"][0]["content"][0]["text"] == "Hello there."
        await until(s.idle)


async def test_pictures_of_a_functions_output():
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    part = {"type": "input_image", "image_url": data_url()}
    output = {"type": "function_call_output", "call_id": "c", "output": [part]}
    async with stack() as s:
        answer = await ask(s, [{"role": "user", "content": "?"}, call, output])
        assert answer.status_code == 200, answer.text
        assert len(s.llm.starts[0].items) == 1


# ---- what the model may write one day, by a script


class ScriptedPipeline(Pipeline):
    """Every job has the same events, and then fails if they have no end."""

    script = ()
    jobs = ()

    async def run(self, job):
        type(self).jobs += (job,)
        for event in self.script:
            yield event
        if not isinstance(self.script[-1], End):
            raise EngineFailure("the step failed")


@contextlib.asynccontextmanager
async def scripted(*events):
    """A stack whose pipeline has these events, and the jobs that it has been given."""
    async with stack(encoders=0, llms=0, ready=False) as s:
        own = s.gateway.pipeline
        kind = type("Script", (ScriptedPipeline,), {"script": events})
        s.gateway.pipeline = kind(
            **{field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        )
        yield s, kind


END = End(Usage(20, 5), {})
CALLS = (
    Reasoning(0, "I should "),
    Reasoning(0, "look."),
    ToolCallStart(0, 0, "call_1", "Look"),
    ToolCallArguments(0, 0, '{"at":'),
    ToolCallArguments(0, 0, "1}"),
    ChoiceEnd(0, "tool_calls"),
    END,
)


class Look(pydantic.BaseModel):
    at: int


@pytest.mark.process  # The client asks the system what machine this is.
async def test_openais_client_parses_calls():
    tools = [openai.pydantic_function_tool(Look)]
    tools = [{"type": "function", **tools[0]["function"]}]
    async with scripted(*CALLS) as (s, kind), openai_client(s) as client:
        response = await client.responses.parse(
            input="Look.", tools=tools, tool_choice="required", **MODEL
        )
        thought, call = response.output
        assert thought.content[0].text == "I should look."
        assert (call.call_id, call.name, call.parsed_arguments) == ("call_1", "Look", {"at": 1})
        (job,) = kind.jobs
        assert job.options.tools.mode is CallMode.REQUIRED and job.options.tools.tools[0].strict
        async with client.responses.stream(input="Look.", tools=tools, **MODEL) as stream:
            snapshots = [
                event.snapshot
                async for event in stream
                if event.type == "response.function_call_arguments.delta"
            ]
            final = await stream.get_final_response()
        assert snapshots == ['{"at":', '{"at":1}']
        assert final.output[1].parsed_arguments == {"at": 1}


@pytest.mark.process  # The client asks the system what machine this is.
async def test_openais_client_parses_a_text_with_a_form():
    events = (Text(0, '{"at"'), Text(0, ":1}"), ChoiceEnd(0, "stop"), END)
    async with scripted(*events) as (s, kind), openai_client(s) as client:
        response = await client.responses.parse(input="?", text_format=Look, **MODEL)
        assert response.output_parsed == Look(at=1)
        async with client.responses.stream(input="?", text_format=Look, **MODEL) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == Look(at=1)
        for job in kind.jobs:
            form = job.options.format
            assert (form.kind, form.param) == (FormatKind.JSON_SCHEMA, "text.format.schema")
            assert form.value["properties"] == {"at": {"title": "At", "type": "integer"}}


@pytest.mark.process  # The client asks the system what machine this is.
async def test_a_failure_in_the_middle_is_an_exception_of_openais_client():
    async with scripted(Text(0, "Hel")) as (s, _), openai_client(s) as client:
        stream = await client.responses.create(input="?", stream=True, **MODEL)
        with pytest.raises(openai.APIError, match="the step failed") as caught:
            async for _ in stream:
                pass
        assert caught.value.code == "engine_failure"
        events = told(await ask(s, stream=True))
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["code"] == "server_error"
        await until(s.idle)


async def test_a_failure_of_a_whole_response_is_a_status():
    async with scripted(Text(0, "Hel")) as (s, _):
        answer = await ask(s)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failure"


# ---- tools and reasoning, as the model's own text

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_and_calls_in_a_models_text(stream):
    thought = "<think>I should look.</think>"
    text = thought + 'I look.<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    settings = {"chat_template": vocabularies.HERMES, "reasoning_parser": "think"}
    async with stack(tokens=[*ids(text), IM_END], **settings) as s:
        answer = await ask(s, tools=[LOOK], stream=stream)
        response = told(answer)[-1]["response"] if stream else answer.json()
        reasoning, said, call = response["output"]
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "I should look."}]
        assert said["content"][0]["text"] == "I look."
        assert (call["name"], call["arguments"]) == ("look", "{}")
        assert (response["status"], call["status"]) == ("completed", "completed")
        details = response["usage"]["output_tokens_details"]
        assert len(ids("I should look.")) <= details["reasoning_tokens"] <= len(ids(thought))
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "A cat."}
        items = [{"role": "user", "content": "?"}, *response["output"], output]
        assert (await ask(s, items, tools=[LOOK])).status_code == 200
        prompt = tokenizer().decode(list(s.llm.starts[1].token_ids))
        assert '"name": "look"' in prompt.partition("I look.")[2] and "A cat." in prompt


# ---- errors and headers


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"input": []}, 400, "input", None),
        ({"model": "gpt-17"}, 404, "model", "model_not_found"),
        ({"store": True}, 400, "store", "unsupported"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id", "unsupported"),
        ({"input": "x " * 9000}, 400, "input", "context_length_exceeded"),
        ({"max_output_tokens": 100_000}, 400, "max_output_tokens", "context_length_exceeded"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, 400, "top_logprobs",
         None),
        ({"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "?"},
            {"type": "input_image", "image_url": "data:image/png;base64,@"}]}]},
         400, "input[0].content[1].image_url", "invalid_base64"),
    ],
)  # fmt: skip
async def test_refusals_name_the_requests_own_fields(fields, status, param, code):
    async with stack() as s:
        answer = await s.client.post("/v1/responses", json={**MODEL, "input": "?", **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
        assert "messages" not in error["message"]
        assert not s.llm.starts and s.idle()


async def test_what_is_ignored_is_told():
    async with stack() as s:
        fields = {
            "include": ["reasoning.encrypted_content"],
            "reasoning": {"effort": "low", "x": 1},
        }
        answer = await ask(s, **fields)
        assert answer.headers["x-opticnerve-warnings"] == (
            "ignored unknown fields: reasoning.x; without effect: include[0], reasoning.effort"
        )
    template = "{{ reasoning_effort }}: {{ messages[0].content }}"
    async with stack(chat_template=template) as s:
        answer = await ask(s, reasoning={"effort": "low"})
        assert "x-opticnerve-warnings" not in answer.headers
        assert tokenizer().decode(list(s.llm.starts[0].token_ids)) == "low: What?"


async def test_log_probabilities_and_timings():
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "timings": True}
    async with stack() as s:
        answer = await ask(s, **fields)
        body = answer.json()
        (text,) = body["output"][0]["content"]
        assert len(text["logprobs"]) == body["usage"]["output_tokens"] - 1  # Without the last.
        assert body["timings"]["total_ms"] > 0
        streamed = told(await ask(s, stream=True, **fields))
        deltas = [entry for event in streamed for entry in event.get("logprobs", ())
                  if "delta" in event]  # fmt: skip
        assert deltas == text["logprobs"]
        assert streamed[-1]["response"]["output"][0]["content"] == [text]


async def test_a_long_request_is_repeated_whole():
    said = "x" * 600_000
    async with scripted(Text(0, "A."), ChoiceEnd(0, "stop"), END) as (s, _):
        events = told(await ask(s, instructions=said, stream=True))
        for event in (events[0], events[-1]):
            assert event["response"]["instructions"] == said
        assert (await ask(s, instructions=said)).json()["instructions"] == said
        await until(s.idle)


@pytest.mark.parametrize("stream", [True, False])
async def test_of_a_request_only_what_is_repeated_stays_while_it_is_answered(stream):
    go = asyncio.Event()
    async with stack() as s:
        s.llm.step = lambda fake, index: go.wait()
        fields = {"instructions": "Be brief.", "stream": stream}
        answer = asyncio.create_task(ask(s, "long " * 100, **fields))
        await s.llm.started.wait()
        assert 0 < s.gateway.admission.bytes.held < 1000
        gc.collect()
        kept = [held for held in gc.get_objects() if type(held) in (ResponsesRequest, ChatPrompt)]
        assert kept == []
        go.set()
        assert (await answer).status_code == 200
        await until(s.idle)


async def test_a_client_that_leaves_frees_everything():
    async with stack() as s:
        held = asyncio.Event()

        async def wait(llm, index):
            if index:
                held.set()
                await asyncio.sleep(60)

        s.llm.step = wait
        async with s.client.stream(
            "POST", "/v1/responses", json={**MODEL, "input": "?", "stream": True}
        ):
            await held.wait()
        await until(s.idle)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "resp_1"),
        ("DELETE", "resp_1"),
        ("POST", "resp_1/cancel"),
        ("GET", "resp_1/input_items"),
    ],
)
async def test_no_response_is_kept(method, path):
    async with stack(encoders=0, llms=0, ready=False) as s:
        answer = await s.client.request(method, f"/v1/responses/{path}")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "not_served")
        assert "it keeps nothing between requests" in error["message"]


async def test_a_key_is_asked_for():
    async with stack(encoders=0, llms=0, ready=False, keys=keys_of(ada="sk-ada")) as s:
        assert (await ask(s)).status_code == 401
