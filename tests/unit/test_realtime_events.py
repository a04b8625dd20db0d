"""What a client may send in a realtime session: each fault is named by its path."""

import json

import pytest

from gateway.api.realtime.client_events import (
    EVENTS,
    UNSUPPORTED_EVENTS,
    ItemCreate,
    ResponseCreate,
    SessionUpdate,
    read_event,
)
from opticnerve.errors import InvalidRequest

HELLO = {"type": "input_text", "text": "Hello"}
AUDIO = {"type": "input_audio", "audio": "AAAA"}
TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": {}}
CALL = {"type": "function_call", "name": "look", "arguments": "{}"}
MANY_VALUES = json.dumps({"a": [[]] * 70_000})


def read(kind, **fields):
    event = {"type": kind, "event_id": "mine", **fields}
    event_id, read_ = read_event(bytearray(json.dumps(event).encode()))
    assert event_id == "mine"
    return read_


def item(**fields):
    return read("conversation.item.create", item={"type": "message", **fields})


def call(**fields):
    return read("conversation.item.create", item={**CALL, **fields})


def update(**settings):
    return read("session.update", session=settings)


def create(**response):
    return read("response.create", response=response)


@pytest.mark.parametrize(
    ("text", "told"), [(b"{", "not valid JSON: EOF"), (b"[]", "should be a JSON object")]
)
def test_text_that_is_no_event(text, told):
    with pytest.raises(InvalidRequest, match=f"^{told}"):
        read_event(bytearray(text))


@pytest.mark.parametrize("kind", UNSUPPORTED_EVENTS)
def test_audio_events_say_what_to_send_instead(kind):
    error = read(kind, audio="AAAA")
    assert error.code == "unsupported" and error.param == "type"
    assert error.message.startswith(f"{kind}: ")


@pytest.mark.parametrize(
    ("event", "param", "code"),
    [
        (read("session.updat"), "type", "invalid_event"),
        (read(3), "type", "invalid_event"),
        (read("session.update"), "session", None),
        (update(audio={"output": {"voice": "marin"}}), "session.audio", "unsupported"),
        (update(output_modalities=["audio"]), "session.output_modalities", "unsupported"),
        (update(type="transcription"), "session.type", "unsupported"),
        (update(prompt={"id": "p"}), "session.prompt", "unsupported"),
        (update(tracing="auto"), "session.tracing", "unsupported"),
        (update(truncation="auto"), "session.truncation", "unsupported"),
        (update(instruction="x"), "session.instruction", "unknown_field"),
        (update(instructions=3), "session.instructions", None),
        (update(max_output_tokens=0), "session.max_output_tokens", None),
        (update(n=2), "session.n", None),
        (update(tools=[{"type": "mcp"}]), "session.tools[0].type", "unsupported"),
        (update(tools=[TOOL, TOOL]), "session.tools", None),
        (update(tool_choice="all"), "session.tool_choice", None),
        (item(role="user", content=[AUDIO]), "item.content[0].type", "unsupported"),
        (item(role="user", content=[HELLO, {"type": "x"}]), "item.content[1]", None),
        (item(role="user", content=[{**HELLO, "type": "output_text"}]), "item.content", None),
        (item(role="assistant", content=[{**HELLO, "type": "text"}]), "item.content[0].type",
         "unsupported"),
        (item(role="system", content=[{"type": "input_image", "image_url": "x"}]), None, None),
        (item(role="user", content=[]), "item.content", None),
        (item(role="tool", content=[HELLO]), "item.role", None),
        (item(role="user", content=[HELLO], id="x" * 200), "item.id", None),
        (read("conversation.item.create", item={"type": "mcp_call"}), "item.type", "unsupported"),
        (read("conversation.item.create", item={"type": "x"}), "item", None),
        (read("conversation.item.create", item=3), "item", None),
        (call(arguments='{"a": '), "item.arguments", None),
        (call(arguments="[]"), "item.arguments", None),
        (call(arguments=MANY_VALUES), "item", None),
        (create(input=[{**CALL, "arguments": "{"}]), "response.input[0].arguments", None),
        (create(input=[CALL, {**CALL, "arguments": MANY_VALUES}]), "response.input", None),
        (read("conversation.item.delete"), "item_id", None),
        (create(input=[{"type": "message", "role": "user", "content": [AUDIO]}]),
         "response.input[0].content[0].type", "unsupported"),
        (create(metadata={"a": 1}), "response.metadata.a", None),
        (create(metadata={str(i): "x" for i in range(17)}), "response.metadata", None),
        (create(conversation="other"), "response.conversation", None),
        (read("response.create", responses={}), "responses", "unknown_field"),
    ],
)  # fmt: skip
def test_faults_are_named(event, param, code):
    assert isinstance(event, InvalidRequest), event
    if param is not None:
        assert event.param == param, event.message
    assert event.code == code


def test_the_parts_of_a_role_are_named():
    assert (
        "output_text in an assistant's message"
        in item(role="assistant", content=[{**HELLO, "type": "text"}]).message
    )
    wrong = item(role="assistant", content=[HELLO])
    assert wrong.message.endswith("should have parts of type output_text, for the role assistant")


def test_what_clients_send_back_is_taken():
    """An item as an event had it, settings as session.created had them."""
    shown = {"id": "item_1", "object": "realtime.item", "status": "completed"}
    assert isinstance(
        item(**shown, role="assistant", content=[{**HELLO, "type": "output_text"}]), ItemCreate
    )
    settings = update(type="realtime", model="model", output_modalities=["text"], tools=[TOOL],
                      tool_choice="auto", max_output_tokens="inf", instructions="",
                      audio={"input": {"turn_detection": None}}, truncation="disabled")  # fmt: skip
    assert isinstance(settings, SessionUpdate)
    assert settings.session.tool_use("session").tools[0].description == "Looks."
    assert isinstance(create(audio={"output": {}}), ResponseCreate)
    assert create(tool_choice="none", tools=[TOOL]).response.tool_use("session") is None


def test_an_id_is_told_even_if_the_event_is_wrong_and_long_ids_are_not():
    assert read_event(bytearray(b'{"event_id":"a"}'))[0] == "a"
    assert read_event(bytearray(b'{"event_id":"%s"}' % (b"a" * 600)))[0] is None
    with pytest.raises(InvalidRequest):
        read_event(bytearray(b"{"))


def test_client_text_is_not_repeated_beyond_its_printable_beginning():
    error = read("\x1b[31m" + "x" * 1000)
    assert "\x1b" not in error.message and len(error.message) < 400


def test_every_event_is_known_by_its_official_name():
    assert set(EVENTS) == {
        "session.update",
        "conversation.item.create",
        "conversation.item.delete",
        "conversation.item.retrieve",
        "response.create",
        "response.cancel",
    }
