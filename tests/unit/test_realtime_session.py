"""A realtime session: a client's events in, the server's out, over a scripted pipeline."""

import asyncio
import contextlib
import json
import logging
from types import SimpleNamespace

import pytest

from gateway.api.models import ServedNames
from gateway.api.realtime import session as sessions
from gateway.api.realtime.session import Client, ClientLeft, Session
from gateway.edge.admission import Admission
from gateway.edge.auth import ANONYMOUS
from gateway.edge.limits import MAX_SESSION_RESPONSES
from gateway.job import UNLIMITED, CallMode
from gateway.output.events import (
    ChoiceEnd,
    End,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from opticnerve.config import GatewayConfig
from opticnerve.errors import ContextLengthExceeded
from opticnerve.generation.values import Usage
from opticnerve.process import Running
from tests.fakes import until
from tests.gateways import data_url

pytestmark = pytest.mark.anyio
USAGE = Usage(prompt_tokens=30, completion_tokens=2, cached_tokens=8, embedding_tokens=9)
HELLO = [Text(0, "Hel", usage=USAGE), Text(0, "lo", usage=USAGE), ChoiceEnd(0, "stop")]
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}}


class ScriptedPipeline:
    """Yields ``events``, then End. While ``gate`` is clear it waits before the last of them."""

    def __init__(self):
        self.events = HELLO
        self.jobs = []
        self.closed = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure = None

    async def run(self, job):
        self.jobs.append(job)
        try:
            if self.failure is not None:
                raise self.failure
            for event in self.events[:-1]:
                yield event
            await self.gate.wait()
            yield self.events[-1]
            yield End(USAGE, {})
        finally:
            self.closed += 1


class Talk:
    """A session, and what it has sent."""

    def __init__(self, **settings):
        self.pipeline = ScriptedPipeline()
        self.admission = Admission(8, 2**24, max_sessions=4)
        config = GatewayConfig(**settings)
        running = Running("the gateway", logging.getLogger(), 1.0)
        self.gateway = SimpleNamespace(
            config=config,
            pipeline=self.pipeline,
            admission=self.admission,
            names=ServedNames.of((), "demo", 4096),
            running=running,
        )
        self.sent = []
        self.left = False

    async def __aenter__(self):
        self.exits = contextlib.ExitStack()
        self.ticket = self.exits.enter_context(self.admission.open_session("a"))
        client = Client(ANONYMOUS, "a", "req-1")
        self.session = Session(self.gateway, client, self.ticket, "demo", self.send)
        return self

    async def __aexit__(self, *_):
        await self.session.close()
        self.exits.close()
        assert self.admission.requests.held == self.admission.bytes.held == 0
        assert self.pipeline.closed == len(self.pipeline.jobs)

    async def send(self, event):
        if self.left:
            raise ClientLeft
        assert event["event_id"].startswith("event_")
        self.sent.append({name: value for name, value in event.items() if name != "event_id"})

    async def say(self, kind, **fields):
        """Sends an event; returns what was sent for it."""
        before = len(self.sent)
        await self.session.take(bytearray(json.dumps({"type": kind, **fields}).encode()))
        return self.sent[before:]

    async def user(self, *parts, **fields):
        content = [
            {"type": "input_text", "text": part} if isinstance(part, str) else part
            for part in parts
        ]
        item = {"type": "message", "role": "user", "content": content, **fields}
        added, done = await self.say("conversation.item.create", item=item)
        assert added["type"] == "conversation.item.added"
        assert done == {**added, "type": "conversation.item.done"}
        return added["item"]["id"]

    async def respond(self, **response):
        """All events of a response, and the last one's ``response``."""
        before = len(self.sent)
        await self.say("response.create", response=response)
        await until(lambda: self.sent[-1]["type"] in ("response.done", "error"))
        return self.sent[before:], self.sent[-1].get("response")

    async def refused(self, kind, **fields):
        (event,) = await self.say(kind, event_id="mine", **fields)
        assert event["type"] == "error" and event["error"]["event_id"] == "mine"
        return event["error"]


def text_of(message):
    """The text of a message of a prompt."""
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def kinds(events):
    return [event["type"] for event in events]


async def test_a_session_says_its_settings_and_takes_others():
    async with Talk() as talk:
        await talk.session.open()
        created = talk.sent[0]["session"]
        assert talk.sent[0]["type"] == "session.created"
        assert created["model"] == "demo" and created["output_modalities"] == ["text"]
        assert created["tools"] == [] and created["max_output_tokens"] == "inf"
        new = {
            "type": "realtime",
            "output_modalities": ["text"],
            "instructions": "Be brief.",
            "max_output_tokens": 20,
            "tools": [TOOL],
            "temperature": 0.5,
            "audio": {"input": {"turn_detection": None}},
        }
        (updated,) = await talk.say("session.update", session=new)
        assert updated["type"] == "session.updated"
        wanted = {"instructions": "Be brief.", "max_output_tokens": 20, "temperature": 0.5}
        assert updated["session"].items() >= wanted.items()
        assert updated["session"]["tools"] == [TOOL]
        (updated,) = await talk.say("session.update", session={"instructions": "", "tools": []})
        assert updated["session"]["instructions"] == "" and updated["session"]["tools"] == []
        assert updated["session"]["temperature"] == 0.5


async def test_a_response_has_the_official_events_in_order():
    async with Talk() as talk:
        asked = await talk.user("Hi", {"type": "input_image", "image_url": data_url()})
        events, done = await talk.respond(metadata={"topic": "greeting"})
        assert kinds(events) == [
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "conversation.item.done",
            "response.output_item.done",
            "response.done",
        ]
        assert events[2]["previous_item_id"] == asked
        assert [event["delta"] for event in events[4:6]] == ["Hel", "lo"]
        assert done["status"] == "completed" and done["status_details"] is None
        assert done["metadata"] == {"topic": "greeting"}
        assert done["conversation_id"] == talk.session.conversation.id
        (item,) = done["output"]
        assert item == events[8]["item"] == events[9]["item"]
        assert item["content"] == [{"type": "output_text", "text": "Hello"}]
        assert done["usage"] == {
            "total_tokens": 32,
            "input_tokens": 30,
            "output_tokens": 2,
            "input_token_details": {
                "text_tokens": 21,
                "image_tokens": 9,
                "audio_tokens": 0,
                "cached_tokens": 8,
            },
            "output_token_details": {"text_tokens": 2, "audio_tokens": 0},
        }
        (job,) = talk.pipeline.jobs
        assert job.options.running_usage and job.options.max_tokens is None


async def test_the_whole_conversation_goes_to_the_model_with_each_turn():
    async with Talk() as talk:
        await talk.say("session.update", session={"instructions": "Be brief."})
        picture = {"type": "input_image", "image_url": data_url(), "detail": "low"}
        asked = await talk.user("What is", picture, "this?")
        await talk.respond()
        await talk.user("And now?")
        await talk.respond(instructions="Be long.", max_output_tokens="inf")
        first, second = (job.prompt for job in talk.pipeline.jobs)
        assert [message.role for message in first.messages] == ["system", "user"]
        parts = first.messages[1].content
        assert [part.type for part in parts] == ["text", "image", "text"]
        assert [message.role for message in second.messages] == [
            *("system", "user", "assistant", "user")
        ]
        assert second.messages[0].content == "Be long."
        assert text_of(second.messages[2]) == "Hello" and text_of(second.messages[3]) == "And now?"
        for prompt in (first, second):
            (source,) = prompt.sources
            assert source.param == f"{asked}.content[1].image_url" and source.low_detail
        assert talk.pipeline.jobs[1].options.max_tokens == UNLIMITED
        assert talk.pipeline.jobs[1].request_id == "req-1-2"


async def test_items_are_inserted_deleted_and_retrieved():
    async with Talk() as talk:
        last = await talk.user("c", id="c")
        assert last == "c"
        first = {
            "type": "message",
            "role": "system",
            "content": [{"type": "input_text", "text": "a"}],
        }
        added, _ = await talk.say(
            "conversation.item.create", item={**first, "id": "a"}, previous_item_id="root"
        )
        assert added["previous_item_id"] is None
        added, _ = await talk.say(
            "conversation.item.create", item={**first, "id": "b"}, previous_item_id="a"
        )
        assert added["previous_item_id"] == "a"
        assert [item.id for item in talk.session.conversation] == ["a", "b", "c"]
        (got,) = await talk.say("conversation.item.retrieve", item_id="b")
        assert got["item"]["content"] == [{"type": "input_text", "text": "a"}]
        assert await talk.say("conversation.item.delete", item_id="b") == [
            {"type": "conversation.item.deleted", "item_id": "b"}
        ]
        assert [item.id for item in talk.session.conversation] == ["a", "c"]
        for kind in ("delete", "retrieve"):
            error = await talk.refused(f"conversation.item.{kind}", item_id="b")
            assert error["code"] == f"item_{kind}_invalid_item_id" and error["param"] == "item_id"
        create = "conversation.item.create"
        error = await talk.refused(create, item={**first, "id": "a"})
        assert error["code"] == "item_create_duplicate_id"
        error = await talk.refused(create, item=first, previous_item_id="b")
        assert error["param"] == "previous_item_id"


async def test_pictures_are_not_sent_back():
    async with Talk() as talk:
        parts = [{"type": "input_image", "image_url": url} for url in (data_url(), "https://x/y")]
        item = await talk.user(*parts)
        (got,) = await talk.say("conversation.item.retrieve", item_id=item)
        assert [part["image_url"] for part in got["item"]["content"]] == [None, "https://x/y"]


async def test_calls_of_functions_and_their_outputs():
    async with Talk() as talk:
        talk.pipeline.events = [
            Reasoning(0, "Hm."),
            Text(0, "I look."),
            ToolCallStart(0, 0, "call_1", "look"),
            ToolCallArguments(0, 0, '{"at":'),
            ToolCallArguments(0, 0, "1}"),
            ToolCallStart(0, 1, "call_2", "look"),
            ToolCallArguments(0, 1, "{}"),
            ChoiceEnd(0, "tool_calls"),
        ]
        await talk.user("Look.")
        named = {"type": "function", "name": "look"}
        events, done = await talk.respond(tools=[TOOL], tool_choice=named)
        assert done["status"] == "completed"
        assert [item["type"] for item in done["output"]] == ["message", *["function_call"] * 2]
        call = done["output"][1]
        assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "look", '{"at":1}')
        place = [kind for kind in kinds(events) if "function_call_arguments" in kind]
        assert place == [
            "response.function_call_arguments.delta",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
        ]
        (ended, _) = [e for e in events if e["type"] == "response.function_call_arguments.done"]
        assert ended["arguments"] == '{"at":1}' and ended["output_index"] == 1
        options = talk.pipeline.jobs[0].options
        assert options.tools.mode is CallMode.NAMED and options.tools.name == "look"
        assert talk.pipeline.jobs[0].prompt.tools == options.tools.tools

        talk.pipeline.events = HELLO
        for call_id in ("call_1", "call_2"):
            output = {"type": "function_call_output", "call_id": call_id, "output": "a cat"}
            await talk.say("conversation.item.create", item=output)
        await talk.respond()
        messages = talk.pipeline.jobs[1].prompt.messages
        assert [message.role for message in messages] == ["user", "assistant", "tool", "tool"]
        assert text_of(messages[1]) == "I look."
        assert [call.id for call in messages[1].tool_calls] == ["call_1", "call_2"]
        assert messages[2].tool_call_id == "call_1" and messages[2].content == "a cat"


async def test_a_call_that_was_cut_off_is_not_shown_to_the_model():
    async with Talk() as talk:
        talk.pipeline.events = [
            Text(0, "I look."),
            ToolCallStart(0, 0, "call_1", "look"),
            ToolCallArguments(0, 0, '{"at":'),
            ChoiceEnd(0, "length"),
        ]
        await talk.user("Look.")
        _, done = await talk.respond(tools=[TOOL])
        assert done["status"] == "incomplete"
        cut = done["output"][1]
        assert cut["status"] == "incomplete" and cut["arguments"] == '{"at":'
        await talk.say("conversation.item.delete", item_id=cut["id"])
        again = {name: cut[name] for name in ("type", "id", "status", "name", "arguments")}
        added, _ = await talk.say("conversation.item.create", item=again)
        assert added["item"]["status"] == "incomplete"
        talk.pipeline.events = HELLO
        _, done = await talk.respond()
        assert done["status"] == "completed"
        shown = talk.pipeline.jobs[1].prompt.messages
        assert [message.role for message in shown] == ["user", "assistant"]
        assert shown[1].tool_calls is None


async def test_arguments_of_all_calls_are_bounded_together():
    async with Talk() as talk:
        call = {
            "type": "function_call",
            "name": "look",
            "arguments": json.dumps({"a": [[]] * 20_000}),
        }
        for _ in range(2):
            await talk.say("conversation.item.create", item=call)
        error = await talk.refused("response.create")
        assert error["param"] == "response.input" and "65536 values" in error["message"]


async def test_tools_that_cannot_be_chosen_are_refused():
    async with Talk() as talk:
        await talk.user("Hi")
        for session in ({"tool_choice": "required"}, {"tool_choice": {**TOOL, "name": "other"}}):
            error = await talk.refused("session.update", session=session)
            assert error["param"] == "session.tool_choice"
            assert error["message"].startswith("session.tool_choice: ")
        error = await talk.refused("response.create", response={"tool_choice": "required"})
        assert error["param"] == "response.tool_choice"
        assert "tool_choice" not in talk.session._settings.model_fields_set


async def test_a_session_without_tools_has_no_choice_of_them():
    async with Talk() as talk:
        session = {"tools": [TOOL], "tool_choice": "required"}
        await talk.say("session.update", session=session)
        (updated,) = await talk.say("session.update", session={"tools": []})
        assert updated["type"] == "session.updated"
        assert updated["session"]["tools"] == []
        assert updated["session"]["tool_choice"] == "auto"


@pytest.mark.parametrize("response_id", [False, True])
async def test_a_response_is_cancelled_with_what_it_has(response_id):
    async with Talk() as talk:
        talk.pipeline.gate.clear()
        await talk.user("Hi")
        await talk.say("response.create")
        await until(lambda: len([s for s in talk.sent if "delta" in s]) == 2)
        busy = await talk.refused("response.create")
        assert busy["code"] == "conversation_already_has_active_response"
        (created,) = [s for s in talk.sent if s["type"] == "response.created"]
        ids = {"response_id": created["response"]["id"]} if response_id else {}
        await talk.say("response.cancel", **ids)
        await until(lambda: talk.sent[-1]["type"] == "response.done")
        done = talk.sent[-1]["response"]
        assert done["status"] == "cancelled"
        assert done["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
        (item,) = done["output"]
        assert item["status"] == "incomplete" and item["content"][0]["text"] == "Hello"
        assert done["usage"]["output_tokens"] == 2
        assert talk.pipeline.closed == 1 and talk.admission.requests.held == 0
        error = await talk.refused("response.cancel", **ids)
        assert error["code"] == "response_cancel_not_active"
        talk.pipeline.gate.set()
        assert (await talk.respond())[1]["status"] == "completed"


async def test_a_cancel_before_the_first_event_ends_the_response():
    async with Talk() as talk:
        talk.pipeline.events = HELLO[-1:]
        talk.pipeline.gate.clear()
        await talk.user("Hi")
        await talk.say("response.create")
        await talk.say("response.cancel")
        await talk.say("conversation.item.retrieve", item_id="x")
        await until(lambda: talk.sent[-1]["type"] == "response.done")
        assert talk.sent[-1]["response"]["status"] == "cancelled"
        assert talk.sent[-1]["response"]["output"] == []


async def test_an_answer_cut_by_its_length_is_incomplete():
    async with Talk() as talk:
        talk.pipeline.events = [*HELLO[:2], ChoiceEnd(0, "length")]
        await talk.user("Hi")
        _, done = await talk.respond()
        assert done["status"] == "incomplete"
        assert done["status_details"] == {"type": "incomplete", "reason": "max_output_tokens"}
        assert done["output"][0]["status"] == "incomplete"


async def test_an_answer_without_text_has_an_empty_item():
    async with Talk() as talk:
        talk.pipeline.events = [ChoiceEnd(0, "stop")]
        await talk.user("Hi")
        _, done = await talk.respond()
        assert done["output"][0]["content"] == [{"type": "output_text", "text": ""}]


async def test_a_response_that_fails_says_why_and_the_session_goes_on():
    async with Talk() as talk:
        await talk.user("Hi")
        talk.pipeline.failure = ContextLengthExceeded("too long", param="messages")
        events, done = await talk.respond()
        assert kinds(events) == ["response.created", "response.done"]
        assert done["status"] == "failed" and done["status_details"]["error"] == {
            "type": "invalid_request_error",
            "code": "context_length_exceeded",
            "message": "too long",
            "param": "messages",
        }
        talk.pipeline.failure = RuntimeError("secret")
        _, done = await talk.respond()
        assert done["status_details"]["error"]["code"] == "internal_error"
        assert "secret" not in json.dumps(talk.sent)
        talk.pipeline.failure = None
        assert (await talk.respond())[1]["status"] == "completed"


async def test_responses_outside_of_the_conversation():
    async with Talk() as talk:
        hello = await talk.user("Hi")
        given = [
            {"type": "item_reference", "id": hello},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Sum"}]},
        ]
        events, done = await talk.respond(conversation="none", input=given)
        assert done["conversation_id"] is None
        assert not any(kind.startswith("conversation.") for kind in kinds(events))
        assert len(talk.session.conversation) == 1
        assert talk.pipeline.jobs[0].body_bytes > 400  # Of what came with the response.
        contents = [text_of(message) for message in talk.pipeline.jobs[0].prompt.messages]
        assert contents == ["Hi", "Sum"]
        error = await talk.refused(
            "response.create", response={"input": [{"type": "item_reference", "id": "x"}]}
        )
        assert error["code"] == "item_reference_invalid_item_id"
        error = await talk.refused("response.create", response={"input": []})
        assert error["param"] == "response.input"


async def test_responses_at_once_are_bounded():
    async with Talk() as talk:
        talk.pipeline.gate.clear()
        await talk.user("Hi")
        for number in range(MAX_SESSION_RESPONSES):
            await talk.say("response.create", response={"conversation": "none"} if number else {})
        error = await talk.refused("response.create", response={"conversation": "none"})
        assert error["type"] == "rate_limit_error"
        talk.pipeline.gate.set()
        await until(lambda: not talk.session.busy)
        assert kinds(talk.sent).count("response.done") == MAX_SESSION_RESPONSES


async def test_responses_count_as_requests():
    async with Talk() as talk:
        talk.admission.requests.most = 0
        await talk.user("Hi")
        _, done = await talk.respond()
        assert done["status_details"]["error"]["code"] == "overloaded"
        assert not talk.pipeline.jobs


async def test_a_conversation_is_bounded_in_bytes_and_items(monkeypatch):
    async with Talk(max_request_bytes=20_000) as talk:
        await talk.user("x" * 10_000, id="first")
        item = {"type": "function_call_output", "call_id": "c", "output": "y" * 10_000}
        create = "conversation.item.create"
        error = await talk.refused(create, item=item)
        assert error["code"] == "conversation_too_large"
        await talk.say("conversation.item.delete", item_id="first")
        assert talk.ticket.bytes == 0
        await talk.say(create, item=item)
        assert len(talk.session.conversation) == 1
        talk.pipeline.events = [Text(0, "z" * 10_000), ChoiceEnd(0, "stop")]
        _, done = await talk.respond()
        assert done["status_details"]["error"]["code"] == "conversation_too_large"
        assert done["output"][0]["content"] == [{"type": "output_text", "text": ""}]
        monkeypatch.setattr("gateway.api.realtime.conversation.MAX_ENTRIES", 2)
        error = await talk.refused(create, item={**item, "output": ""})
        assert error["code"] == "conversation_too_large"


async def test_bytes_of_a_session_count_with_those_of_all():
    async with Talk() as talk:
        await talk.user("x" * 1000)
        assert talk.admission.bytes.held > 1000
        talk.admission.bytes.most = talk.admission.bytes.held + 4_000  # For the event alone.
        item = {"type": "function_call_output", "call_id": "c", "output": "y"}
        error = await talk.refused("conversation.item.create", item=item)
        assert error["code"] == "overloaded"


async def test_a_response_holds_its_items_until_its_prompt_is_rendered():
    async with Talk() as talk:
        talk.pipeline.gate.clear()
        item = await talk.user({"type": "input_image", "image_url": "data:," + "A" * 2**20})
        await talk.say("response.create")
        await until(lambda: talk.pipeline.jobs)
        await talk.say("conversation.item.delete", item_id=item)
        assert talk.admission.bytes.held > 2**20
        talk.pipeline.jobs[0].drop_prompt()
        assert talk.admission.bytes.held < 2**20
        talk.pipeline.gate.set()
        await until(lambda: not talk.session.busy)


async def test_a_client_that_has_left_ends_its_responses():
    async with Talk() as talk:
        talk.pipeline.gate.clear()
        await talk.user("Hi")
        await talk.say("response.create")
        talk.left = True
        talk.pipeline.gate.set()
        await until(lambda: not talk.session.busy)
        with pytest.raises(ClientLeft):
            await talk.say("conversation.item.retrieve", item_id="x")


async def test_a_stopped_gateway_lets_a_response_end_and_begins_none():
    async with Talk() as talk:
        talk.pipeline.gate.clear()
        await talk.user("Hi")
        await talk.say("response.create")
        draining = asyncio.create_task(talk.session.drain())
        await asyncio.sleep(0)
        error = await talk.refused("response.create", response={"conversation": "none"})
        assert error["code"] == "server_stopping"
        assert not draining.done()
        talk.pipeline.gate.set()
        await draining
        assert talk.sent[-1]["response"]["status"] == "completed"


async def test_a_response_that_is_cut_by_a_stop_fails_with_a_typed_error():
    async with Talk() as talk:
        talk.pipeline.gate.clear()
        await talk.user("Hi")
        await talk.say("response.create")
        await until(lambda: talk.pipeline.jobs)
        talk.gateway.running.cut()
        await until(lambda: talk.sent[-1]["type"] == "response.done")
        assert talk.sent[-1]["response"]["status_details"]["error"]["code"] == "unavailable"


async def test_a_response_ends_by_its_deadline_even_if_nobody_reads(monkeypatch):
    monkeypatch.setattr(sessions, "ERROR_DELIVERY_S", 0.0)
    async with Talk(request_timeout_s=0.05) as talk:
        talk.pipeline.gate.clear()
        await talk.user("Hi")
        _, done = await talk.respond()
        assert done["status_details"]["error"]["code"] == "deadline_exceeded"
