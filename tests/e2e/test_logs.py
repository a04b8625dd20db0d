"""One request across three processes: one line in each that touched it, found by its id."""

import base64
import json

import grpc
import pytest

from tests.e2e.conftest import data_url, user
from tests.e2e.processes import picture
from tests.system import wait_for

CHAT = "/v1/chat/completions"
SECRET = "ocelot"  # In each prompt, and in no line.
PIXELS = "iVBORw0KGgo"  # Of each picture's data: URL, which is a PNG; in no line either.


def log(stack):
    """Every whole line of the stack's log: all of them are JSON."""
    text = stack.log()
    assert SECRET not in text and PIXELS not in text
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def lines(stack, identity, *processes):
    """The line of a request in each of ``processes``; there is no other with its id."""

    def found():
        made = [line for line in log(stack) if line.get("request_id") == identity]
        return made if {line["process"] for line in made} >= set(processes) else None

    made = wait_for(f"the lines of {identity}", found)
    assert sorted(line["process"] for line in made) == sorted(processes)
    assert {line["level"] for line in made} == {"info"}
    return [next(line for line in made if line["process"] == name) for name in processes]


def request(stack, identity, *urls, **fields):
    body = {"model": "model", "messages": [user(f"Is it an {SECRET}?", *urls)], **fields}
    headers = {"x-request-id": identity}
    return stack._http.build_request("POST", CHAT, json=body, headers=headers)


def test_an_answer_tells_workers_tokens_and_stages(stack):
    sent = request(stack, "log-answered", picture(910), max_tokens=4, ignore_eos=True)
    assert stack._http.send(sent).status_code == 200
    gateway, encoder, llm = lines(stack, "log-answered", "gateway", "encoder", "llm")
    assert gateway["status"] == 200 and gateway["path"] == CHAT and gateway["finish"] == ["length"]
    assert gateway["encoder"] == [encoder["worker"]] and gateway["llm"] == [llm["worker"]]
    assert gateway["prompt_tokens"] == llm["prompt_tokens"] > encoder["tokens"] > 0
    assert gateway["completion_tokens"] == llm["completion_tokens"] == 4
    assert {"ms", "ttft_ms", "queue_ms", "encode_ms", "prefill_ms"} <= gateway.keys()
    assert {"ms", "queue_ms", "preprocess_ms", "encode_ms", "put_ms"} <= encoder.keys()
    assert {"ms", "ttft_ms", "queue_ms", "prefill_ms", "decode_ms"} <= llm.keys()
    assert (encoder["status"], llm["status"], llm["ended"]) == ("OK", "OK", "finished")


def test_a_picture_that_fails_at_the_encoder(stack):
    """Its head is right, so that the gateway sends it; most of its pixels are missing."""
    whole = base64.b64decode(picture(911).partition(",")[2])
    sent = request(stack, "log-damaged", data_url(whole[: len(whole) // 2]))
    assert stack._http.send(sent).status_code == 400
    gateway, encoder, llm = lines(stack, "log-damaged", "gateway", "encoder", "llm")
    assert gateway["status"] == 400 and gateway["encoder"] == [encoder["worker"]]
    assert {line["code"] for line in (gateway, encoder, llm)} == {"invalid_media"}
    assert encoder["status"] == llm["status"] == "INVALID_ARGUMENT"
    assert all("damaged" in line["reason"] for line in (gateway, encoder, llm))


def test_a_request_that_is_refused(stack):
    sent = request(stack, "log-refused", max_tokens=100_000)
    assert stack._http.send(sent).status_code == 400
    (gateway,) = lines(stack, "log-refused", "gateway")
    assert gateway["code"] == "context_length_exceeded" and gateway["prompt_tokens"] > 0
    assert gateway["model"] == "model" and gateway["reason"]


def test_a_stream_that_its_client_cuts(stack):
    sent = request(stack, "log-cut", stream=True, max_tokens=4000, ignore_eos=True)
    answer = stack._http.send(sent, stream=True)
    next(answer.iter_lines())
    answer.close()
    gateway, llm = lines(stack, "log-cut", "gateway", "llm")
    assert gateway["ended"] == "cut by the client" and llm["ended"] == "cut by its caller"
    assert 0 < gateway["completion_tokens"] < 4000 and gateway["llm"] == [llm["worker"]]


def test_bytes_that_are_no_message_are_one_line(stack):
    """Of a probe, since other calls take a token first."""
    before = log(stack)
    ready = next(line for line in before if line["message"].startswith("ready at"))
    with grpc.insecure_channel(ready["message"].split()[-1]) as channel:
        call = channel.stream_stream("/grpc.health.v1.Health/Check")(iter([b"\xff\xff"]))
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (line,) = wait_for("its line", lambda: log(stack)[len(before) :])
    assert line["status"] == "INVALID_ARGUMENT" and line["process"] == ready["process"]
    assert "exception" not in line
