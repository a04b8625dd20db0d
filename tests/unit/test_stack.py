"""``opticnerve.serve`` and ``opticnerve ask`` as clients, without a stack: flags and errors."""

import json
import os
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from opticnerve.cli import chat_client
from opticnerve.errors import InvalidRequest, OpticNerveError, Overloaded, StartupError, Unavailable
from opticnerve.local import serve as stack


def answering(handler):
    made = stack.Stack("http://gateway", "model", None)
    made._http = httpx2.Client(base_url=made.url, transport=httpx2.MockTransport(handler))
    return made


def failing(status, headers=None, **error):
    return lambda request: httpx2.Response(status, json={"error": error}, headers=headers)


def test_an_error_keeps_its_class_param_and_code():
    told = {"message": "too many", "type": "t", "param": "messages[0]", "code": "too_many_images"}
    with pytest.raises(InvalidRequest) as caught:
        answering(failing(400, **told)).chat(["Hello"])
    error = caught.value
    assert (error.message, error.param, error.code) == (
        "too many", "messages[0]", "too_many_images",
    )  # fmt: skip
    with pytest.raises(Overloaded) as caught:
        answering(failing(429, {"retry-after": "3"}, message="later")).chat(["Hello"])
    assert caught.value.retry_after_s == 3


def test_an_answer_that_is_no_json_and_none_at_all():
    with pytest.raises(OpticNerveError, match="502"):
        answering(lambda request: httpx2.Response(502, text="<html>")).chat(["Hello"])

    def refuse(request):
        raise httpx2.ConnectError("refused", request=request)

    with pytest.raises(Unavailable, match="http://gateway"):
        answering(refuse).chat(["Hello"])


def test_a_stream_is_not_what_chat_gives():
    with pytest.raises(TypeError, match=r"server\.openai"):
        answering(failing(500)).chat("Hello", stream=True)


def test_an_error_within_a_stream_keeps_its_fields():
    told = {"message": "gone", "type": "t", "param": "messages[1]", "code": "unavailable"}
    lines = [f"data: {json.dumps({'error': told})}", "data: [DONE]"]
    with pytest.raises(Unavailable) as caught:
        list(chat_client.read_events(iter(lines)))
    assert (caught.value.param, caught.value.code) == ("messages[1]", "unavailable")


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"encoders": 2, "port": 7}, ["--port", "7", "--encoders", "2"]),
        ({"public_models": False}, ["--port", "0", "--no-public-models"]),
        ({"no_prefix_caching": True}, ["--port", "0", "--no-prefix-caching"]),
        ({"no_prefix_caching": False, "revision": None}, ["--port", "0"]),
        ({"llm_devices": (0, 1)}, ["--port", "0", "--llm-devices", "0,1"]),
    ],
)
def test_flags_of_serve(given, flags):
    assert stack._up_command(None, given) == (flags, {})


def test_a_flag_that_up_does_not_have_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(stack.subprocess, "Popen", None)
    expected = "has no flag encoder, did you mean encoders"
    with pytest.raises(StartupError, match=expected), stack.serve(encoder=2):
        pass


def test_serve_shows_no_password_on_a_command_line(monkeypatch):
    class Caught(Exception):
        pass

    def popen(command, *, env, **_):
        raise Caught(command, env)

    monkeypatch.setattr(stack.subprocess, "Popen", popen)
    with pytest.raises(Caught) as caught, stack.serve(store="redis://:secret@host", encoders=2):
        pass
    command, environment = caught.value.args
    assert "secret" not in " ".join(command) and command[-4:-2] == ["--encoders", "2"]
    assert environment["OPTICNERVE_STORE"] == "redis://:secret@host"
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.process
def test_a_stack_that_is_asked_for_wrongly_says_why_in_one_line():
    with pytest.raises(StartupError) as caught, stack.serve("/no/such/model"):
        pass
    assert caught.value.message.startswith("there is no directory /no/such/model")
    assert "\n" not in caught.value.message


# ---- questions


def echo(request):
    """Answers with the last text, and with how many pictures came with it."""
    *pictures, text = json.loads(request.content)["messages"][-1]["content"]
    assert all(part["image_url"]["url"].startswith(("data:", "http")) for part in pictures)
    told = f"{text['text']}+{len(pictures)}" if pictures else text["text"]
    return httpx2.Response(200, json={"choices": [{"message": {"content": told}}]})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(path)
    return path


def test_one_question_has_one_answer_and_a_list_a_list(file):
    server = answering(echo)
    image = Image.new("CMYK", (30, 30))
    assert server.chat("What is this?") == "What is this?"
    assert server.chat(("What?", file)) == "What?+1"
    assert server.chat(("What?", str(file), b"bytes", image, "https://example.com/a.png")) == (
        "What?+4"
    )
    assert server.chat(("What?", [file, image])) == "What?+2"
    assert server.chat(("What?",)) == "What?"
    assert server.chat(["One?", ("Two?", file), "Three?"]) == ["One?", "Two?+1", "Three?"]
    assert server.chat(["What is this?"]) == ["What is this?"]
    assert server.chat([]) == []


NO_QUESTIONS = [
    None, {}, {"text": "What?"}, b"What?", 5, (), Path("photo.png"), iter(["What?"]), {"What?"},
    [["What?"]], [None], [b"What?"], ["One?", 5], [()], Image.new("RGB", (1, 1)),
    (b"bytes", "What?"), (Image.new("RGB", (1, 1)), "What?"), (Path("photo.png"), "What?"),
    ("What?", 5), ("What?", None), ("What?", np.zeros((8, 8, 3), np.uint8)), ("What?", [[b"x"]]),
    ("What?", {"url": "x"}), (("What?", b"x"), ("And?", b"x")), ["What?", Image.new("RGB", (1, 1))],
]  # fmt: skip


@pytest.mark.parametrize("questions", NO_QUESTIONS)
def test_what_is_no_question_is_a_type_error_that_shows_the_form(questions):
    asked = []
    with pytest.raises(TypeError) as caught:
        answering(asked.append).chat(questions)
    assert 'a question is "text", or a tuple ("text", picture, ...)' in str(caught.value)
    assert not asked


def test_a_picture_before_its_text_and_a_picture_that_is_not_there(file):
    asked = []
    with pytest.raises(TypeError, match="the text comes before its pictures"):
        answering(asked.append).chat((str(file), "What is this?"))
    for missing in ("/no/such/photo.png", Path("/no/such/photo.png")):
        with pytest.raises(InvalidRequest, match=r"no picture /no/such/photo\.png"):
            answering(asked.append).chat(["One?", ("Two?", missing)])
    with pytest.raises(InvalidRequest, match=f"cannot read the picture {file.parent}: Is a dir"):
        answering(asked.append).chat(("What?", file.parent))
    assert not asked
