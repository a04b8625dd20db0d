"""Tools and reasoning over HTTP: what scripted workers write, as openai's client reads it."""

import json

import openai
import pydantic
import pytest

from tests import vocabularies as v
from tests.gateways import END, data_url, events, ids, stack, user
from tests.integration.test_gateway_completions import openai_client

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}


TOOLS = [tool("weather"), tool("news")]
ARGUMENTS = '{"city": "Oslo"}'


def call(name):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {ARGUMENTS}}}\n</tool_call>'


TEXT = f"I look.\n{call('weather')}\n{call('news')}"


def serving(text=TEXT, template=v.HERMES, **settings):
    return stack(tokens=[*ids(text), END], encoders=0, chat_template=template, **settings)


def asked(**fields):
    return {"model": "model", "messages": [user("And in Oslo?")], "tools": TOOLS, **fields}


def calls(choice):
    return [(each.function.name, each.function.arguments) for each in choice.message.tool_calls]


BOTH = [("weather", ARGUMENTS), ("news", ARGUMENTS)]


@pytest.mark.process  # The client asks the system what machine this is.
async def test_a_whole_answer_with_calls():
    async with serving() as s, openai_client(s) as client:
        (choice,) = (await client.chat.completions.create(**asked())).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        assert calls(choice) == BOTH
        assert len({each.id for each in choice.message.tool_calls}) == 2
        assert all(each.id.startswith("call_") for each in choice.message.tool_calls)
    async with serving(call("news")) as s, openai_client(s) as client:
        (choice,) = (await client.chat.completions.create(**asked())).choices
        assert choice.message.content is None and calls(choice) == BOTH[1:]


@pytest.mark.process  # The client asks the system what machine this is.
async def test_a_streamed_answer_is_the_whole_one():
    async with serving() as s, openai_client(s) as client:
        async with client.chat.completions.stream(**asked()) as stream:
            names = [e.name async for e in stream if e.type == "tool_calls.function.arguments.done"]
            (choice,) = (await stream.get_final_completion()).choices
        assert names == ["weather", "news"]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        assert calls(choice) == BOTH


async def test_chunks_have_openais_form():
    async with serving() as s:
        answer = await s.client.post("/v1/chat/completions", json=asked(stream=True))
        chunks = [chunk["choices"][0] for chunk in events(answer.text)[:-1]]
        deltas = [each for c in chunks for each in c["delta"].get("tool_calls", ())]
        begun = [each for each in deltas if "id" in each]
        assert [each["index"] for each in begun] == [0, 1]
        assert all(each["type"] == "function" for each in begun)
        assert [each["function"] for each in begun] == [
            {"name": "weather", "arguments": ""},
            {"name": "news", "arguments": ""},
        ]
        assert all("content" not in c["delta"] for c in chunks if "tool_calls" in c["delta"])
        assert sum(each["index"] == 0 for each in deltas) > 5  # Arguments stream.


@pytest.mark.process  # The client asks the system what machine this is.
async def test_a_client_parses_calls():
    class Weather(pydantic.BaseModel):
        city: str

    async with serving(call("Weather")) as s, openai_client(s) as client:
        tools = [openai.pydantic_function_tool(Weather)]
        parsed = await client.chat.completions.parse(**asked(tools=tools))
        (made,) = parsed.choices[0].message.tool_calls
        assert made.function.parsed_arguments == Weather(city="Oslo")


@pytest.mark.parametrize("stream", [True, False])
async def test_only_one_call_ends_the_generation(stream):
    async with serving() as s:
        fields = asked(parallel_tool_calls=False, stream=stream)
        answer = await s.client.post("/v1/chat/completions", json=fields)
        chunks = events(answer.text)[:-1] if stream else [answer.json()]
        choices = [chunk["choices"][0] for chunk in chunks]
        part = "delta" if stream else "message"
        found = [each for c in choices for each in c[part].get("tool_calls", ())]
        assert [each["function"]["name"] for each in found if "id" in each] == ["weather"]
        assert "".join(each["function"]["arguments"] for each in found) == ARGUMENTS
        assert choices[-1]["finish_reason"] == "tool_calls"
        if not stream:
            assert answer.json()["usage"]["completion_tokens"] < len(ids(TEXT))


async def test_an_answer_that_is_cut_short_within_a_call():
    async with serving() as s:
        for fields, reason in (
            ({"max_tokens": len(ids(TEXT)) - 20}, "length"),
            ({"stop": "slo"}, "stop"),
        ):
            answer = (await s.client.post("/v1/chat/completions", json=asked(**fields))).json()
            (choice,) = answer["choices"]
            assert choice["finish_reason"] == reason
            assert ARGUMENTS.startswith(
                choice["message"]["tool_calls"][-1]["function"]["arguments"]
            )
        answer = (await s.client.post("/v1/chat/completions", json=asked(stop="news"))).json()
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_log_probabilities_of_calls_are_complete_and_in_order(stream):
    """Those of reasoning that is not shown are not shown either."""
    thought = "<think>hm</think>"
    async with serving(thought + TEXT, reasoning_parser="think") as s:
        for shows, text in ((True, thought + TEXT), (False, TEXT)):
            fields = asked(logprobs=True, stream=stream, include_reasoning=shows)
            answer = await s.client.post("/v1/chat/completions", json=fields)
            chunks = events(answer.text)[:-1] if stream else [answer.json()]
            found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
            tokens = [each["token"] for entry in found if entry for each in entry["content"]]
            assert "".join(tokens) == text


async def test_a_tools_result_may_be_a_picture():
    called = {"id": "1", "type": "function", "function": {"name": "news", "arguments": ARGUMENTS}}
    result = user("a map:", data_url())["content"]
    messages = [
        user("And in Oslo?", data_url("blue")),
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": result},
    ]
    async with stack(chat_template=v.HERMES) as s:
        answer = await s.client.post("/v1/chat/completions", json=asked(messages=messages))
        assert answer.status_code == 200, answer.text
        (start,) = s.llm.starts
        assert [span.item for span in start.spans] == [0, 1] and len(s.encoder.calls) == 2


async def test_text_is_no_call_without_tools_or_with_none():
    async with serving() as s:
        for fields in ({"tools": []}, {"tool_choice": "none"}):
            answer = await s.client.post("/v1/chat/completions", json=asked(**fields))
            (choice,) = answer.json()["choices"]
            assert choice["message"]["content"] == TEXT and choice["finish_reason"] == "stop"
            assert "tool_calls" not in choice["message"]


async def test_tools_that_would_not_be_seen_or_heard():
    for settings, remedy in (
        ({"template": "{{ messages[0].content[0].text }}"}, "--chat-template"),
        ({"tool_parser": "none"}, "--tool-parser"),
        ({"template": "{{ tools }}{{ messages[0].content[0].text }}"}, "--tool-parser"),
    ):
        async with serving(**settings) as s:
            answer = await s.client.post("/v1/chat/completions", json=asked())
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == "tools" and remedy in error["message"]


NAMED = {"type": "function", "function": {"name": "news"}}


async def test_workers_get_the_grammar_of_calls_that_must_be_made():
    async with serving(call("news")) as s:
        for fields in ({"tool_choice": "required"}, {"tool_choice": NAMED}):
            answer = await s.client.post("/v1/chat/completions", json=asked(**fields))
            assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
        await s.client.post("/v1/chat/completions", json=asked())
        thinking = {"chat_template_kwargs": {"enable_thinking": True}}
        fields = asked(tool_choice="required", **thinking)
        answer = await s.client.post("/v1/chat/completions", json=fields)
        assert "reasoning_content" in answer.json()["choices"][0]["message"]
        required, named, free, after = (start.sampling.grammar for start in s.llm.starts)
        assert (
            required != named and "weather" in json.loads(required)["grammars"][1]["lark_grammar"]
        )
        assert "weather" not in named and free == ""
        assert "start: thought @answer" in json.loads(after)["grammars"][0]["lark_grammar"]


async def test_a_strict_tool_that_the_model_may_choose():
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    async with serving() as s:
        answer = await s.client.post("/v1/chat/completions", json=asked(tools=tools))
        assert "x-opticnerve-warnings" not in answer.headers
        assert "weather" in s.llm.starts[0].sampling.grammar
    async with serving(template=v.LLAMA_TOOLS) as s:
        answer = await s.client.post("/v1/chat/completions", json=asked(tools=tools))
        assert "not enforced: strict" in answer.headers["x-opticnerve-warnings"]
        assert s.llm.starts[0].sampling.grammar == ""


async def test_a_bad_schema_is_refused_before_any_worker_is_asked():
    schema = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    bad = {"type": "function", "function": {"name": "f", "parameters": schema}}
    async with serving() as s:
        for choice in ("required", {"type": "function", "function": {"name": "f"}}):
            fields = asked(tools=[bad], tool_choice=choice)
            answer = await s.client.post("/v1/chat/completions", json=fields)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == "tools" and "nothing" in error["message"]
        assert s.llm.starts == []


# ---- reasoning

THOUGHT = "<think>\nIt is far.\n</think>\n\nYes."


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_is_told_apart(stream):
    async with serving(THOUGHT) as s:
        for fields, reasoning in (({}, "It is far."), ({"include_reasoning": False}, "")):
            fields = asked(tools=[], stream=stream, **fields)
            answer = await s.client.post("/v1/chat/completions", json=fields)
            chunks = events(answer.text)[:-1] if stream else [answer.json()]
            parts = [chunk["choices"][0]["delta" if stream else "message"] for chunk in chunks]
            assert "".join(part.get("content", "") for part in parts) == "Yes."
            assert "".join(part.get("reasoning_content", "") for part in parts) == reasoning
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [True, False])
async def test_usage_has_the_tokens_of_reasoning(stream):
    for text, thinks in ((THOUGHT, True), ("Yes.", False)):
        async with serving(text) as s:
            shown = {
                "stream": stream,
                "stream_options": {"include_usage": True} if stream else None,
            }
            answer = await s.client.post("/v1/chat/completions", json=asked(tools=[], **shown))
            usage = (events(answer.text)[-2] if stream else answer.json())["usage"]
            details = usage.get("completion_tokens_details", {"reasoning_tokens": 0})
            assert 0 <= details["reasoning_tokens"] < usage["completion_tokens"]
            assert (details["reasoning_tokens"] > 0) == thinks


async def test_a_template_may_begin_the_reasoning():
    async with serving("It is far.\n</think>\n\nYes.") as s:
        for thinking, reasoning in ((True, "It is far."), (False, None)):
            fields = asked(tools=[], chat_template_kwargs={"enable_thinking": thinking})
            answer = await s.client.post("/v1/chat/completions", json=fields)
            message = answer.json()["choices"][0]["message"]
            assert message.get("reasoning_content") == reasoning
            assert message["content"] == ("Yes." if thinking else "It is far.\n</think>\n\nYes.")


async def test_completions_are_text():
    async with serving(THOUGHT) as s:
        answer = await s.client.post(
            "/v1/completions", json={"model": "model", "prompt": "x", "max_tokens": 99}
        )
        assert answer.json()["choices"][0]["text"] == THOUGHT


async def test_the_answers_describe_themselves():
    async with serving() as s:
        document = (await s.client.get("/openapi.json")).json()
        assert {"MessageToolCall", "ToolCallDelta"} <= document["components"]["schemas"].keys()
        assert json.dumps(document).count("reasoning_content") >= 2
