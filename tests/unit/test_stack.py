"""``opticnerve.serve`` and ``opticnerve ask`` as clients, without a stack: flags and errors."""

import json

import httpx2
import pytest

from opticnerve import ask, stack
from opticnerve.errors import InvalidRequest, OpticNerveError, Overloaded, StartupError, Unavailable


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


def test_an_error_within_a_stream_keeps_its_fields():
    told = {"message": "gone", "type": "t", "param": "messages[1]", "code": "unavailable"}
    lines = [f"data: {json.dumps({'error': told})}", "data: [DONE]"]
    with pytest.raises(Unavailable) as caught:
        list(ask._events(iter(lines)))
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
    assert stack._arguments(None, given) == flags


def test_a_stack_that_is_asked_for_wrongly_says_why_in_one_line():
    with pytest.raises(StartupError) as caught, stack.serve("/no/such/model"):
        pass
    assert caught.value.message.startswith("there is no directory /no/such/model")
    assert "\n" not in caught.value.message
