"""The one line that a request leaves in the gateway's log: what it asked for, how it ended, why."""

import asyncio
import contextlib
import json
import logging

import pytest

from opticnerve.errors import InvalidMedia, Overloaded
from opticnerve.telemetry.logs import Formatter
from tests.fakes import until
from tests.gateways import body, data_url, ids, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]

CHAT = "method=POST path=/v1/chat/completions"


def lines(caplog):
    """Level and text of every record of a request, and of all that went wrong otherwise."""
    return [
        (record.levelname, Formatter("text").format(record).partition("] ")[2])
        for record in caplog.records
        if record.name == "gateway.edge.middleware" or record.levelno > logging.INFO
    ]


async def test_it_says_why_a_request_is_refused(caplog):
    caplog.set_level(logging.DEBUG)
    async with stack() as s:
        for sent in (
            s.chat(temperature="hot"),
            s.chat(model="no\nsuch\x1b[31m" + "y" * 300),
            s.chat(user("What?", "data:image/png;base64,AAAAsecretAAAA")),
            s.client.get("/v1/nothing%0AI forged [x] here%1b" + "y" * 300),
            s.client.get("/v1/chat/completions"),
            s.client.get("/ready?pictures=perhaps"),
        ):
            assert (await sent).status_code >= 400
        await s.chat()
    found = lines(caplog)
    refused = "code=invalid_request_error"
    expected = [
        (f"{CHAT} status=400", f'{refused} param=temperature reason="temperature: should be a num'),
        (f"{CHAT} status=404", "code=model_not_found param=model reason=\"there is no model 'no"),
        (f"{CHAT} status=400", "code=unsupported_image_format param=messages[0].content[0].image_"),
        ('method=GET path="/v1/nothing?I forged [x] here?yyy', "status=404"),
        ("method=GET path=/v1/chat/completions status=405", "code=method_not_allowed reason="),
        ("method=GET path=/ready status=400", f"{refused} param=pictures reason="),
        (f"{CHAT} status=200", "finish=stop"),
    ]
    for (level, line), (begins, why) in zip(found, expected, strict=True):
        assert level == ("DEBUG" if "/ready" in line else "INFO")
        assert line.startswith(f"request {begins}") and why in line
        assert line.isprintable() and line.isascii() and len(line) < 600 and "secret" not in line


async def test_a_refused_head_is_called_head(caplog):
    """Routes that take GET serve it as GET."""
    caplog.set_level(logging.INFO)
    async with stack() as s:
        assert (await s.client.head("/v1/chat/completions")).status_code == 405
    (line,) = [line for _, line in lines(caplog) if "status=405" in line]
    assert "method=HEAD" in line and "takes POST, not HEAD" in line


async def test_a_whole_answer_tells_workers_tokens_and_stages(caplog):
    caplog.set_level(logging.INFO)
    async with stack() as s:
        await s.chat(user("What?", data_url("red")))
        worker, encoder = s.llm.address, s.encoder.address
    (told,) = [
        record.fields for record in caplog.records if record.name == "gateway.edge.middleware"
    ]
    assert told["llm"] == [worker] and told["encoder"] == [encoder]
    assert told["model"] == "model" and told["finish"] == ["stop"] and told["images"] == 1
    assert told["prompt_tokens"] > 20 and told["completion_tokens"] == len(ids("Hello there.")) + 1
    assert {"ms", "ttft_ms", "encode_ms", "queue_ms", "decode_ms"} <= told.keys()


async def test_requests_that_share_an_encoding_say_so(caplog):
    """The encoder knows it by the id of the first."""
    caplog.set_level(logging.INFO)
    async with stack() as s:
        gate = asyncio.Event()

        async def script(fake):
            await gate.wait()
            raise InvalidMedia("the picture is damaged")

        s.encoder.script = script
        picture = user("What?", data_url("red"))
        first = asyncio.create_task(s.chat(picture, headers={"x-request-id": "first"}))
        await s.encoder.started.wait()
        second = asyncio.create_task(s.chat(picture, headers={"x-request-id": "second"}))
        flights = s.gateway.pipeline.encoders._flights._flights
        await until(lambda: [flight.waiters for flight in flights.values()] == [2])
        gate.set()
        assert [(await each).status_code for each in (first, second)] == [400, 400]
        encoder = s.encoder.address
    told = [record.fields for record in caplog.records if record.name == "gateway.edge.middleware"]
    assert all(each["encoder"] == [encoder] for each in told)
    assert sorted(str(each.get("encoded_as")) for each in told) == ["None", "['first']"]
    assert {each["code"] for each in told} == {"invalid_media"}


async def test_it_says_why_a_request_could_not_be_served(caplog):
    """Before the answer has begun, and where it is a stream with status 200."""
    async with stack(worker_wait_s=0.2) as s:
        caplog.set_level(logging.INFO)

        async def fail(fake, index):
            if index:
                raise Overloaded("no more\nroom", retry_after_s=1.0)

        s.llm.step = fail
        answer = await s.chat(stream=True)
        assert answer.status_code == 200 and "no more" in answer.text
        await s.llm.die()
        assert (await s.chat()).status_code == 503
    told = [(level, line) for level, line in lines(caplog) if line.startswith("request")]
    (_, streamed), (level, refused) = told
    assert " status=200 " in streamed and 'code=overloaded reason="no more?room"' in streamed
    assert level == "WARNING" and " status=503 " in refused
    assert "code=unavailable " in refused and "no LLM is serving" in refused


async def test_a_bug_is_one_record_with_its_traceback_and_its_request(caplog, monkeypatch):
    async with stack() as s:
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(s.gateway, "names", None)
        assert (await s.chat()).status_code == 500
    ((level, line),) = lines(caplog)
    assert level == "ERROR" and "status=500" in line and "code=internal_error" in line
    rest = line.splitlines()[1:]
    assert "AttributeError" in rest[-1] and all(each.startswith("    ") for each in rest)


@contextlib.asynccontextmanager
async def streaming(s, payload):
    """A stream that has begun, on a connection of its own."""
    host, port = s.client.base_url.host, s.client.base_url.port
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    await reader.readuntil(b"data: ")
    try:
        yield writer
    finally:
        writer.close()


async def test_a_stream_that_its_client_cuts_is_one_line(caplog):
    caplog.set_level(logging.INFO)
    payload = json.dumps(body(stream=True, max_tokens=4000)).encode()
    async with stack(tokens=ids("Hello there. ") * 200) as s:
        gate = asyncio.Event()

        async def wait(fake, index):
            if index == 8:
                await gate.wait()

        s.llm.step = wait
        async with streaming(s, payload) as writer:
            writer.transport.abort()
            await until(s.idle)
    ((level, line),) = lines(caplog)
    assert level == "INFO" and 'ended="cut by the client"' in line and "status=200" in line
    assert "completion_tokens=" in line and "llm=127.0.0.1:" in line


async def test_a_templates_own_words_are_for_the_client_alone(caplog, tmp_path):
    """They may quote a message."""
    caplog.set_level(logging.DEBUG)
    template = tmp_path / "template"
    template.write_text("{{ raise_exception('not: ' + messages[0]['content']) }}")
    async with stack(chat_template=str(template)) as s:
        answer = await s.chat({"role": "user", "content": "my secret"})
        assert answer.status_code == 400 and "not: my secret" in answer.text
    ((_, line),) = lines(caplog)
    assert "code=template_refusal param=messages" in line
    assert "secret" not in caplog.text + line
