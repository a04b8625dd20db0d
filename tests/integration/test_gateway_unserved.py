"""Routes of OpenAI's that are not served: a 404 that says what is, and what to use."""

import json

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.gateways import connected, stack

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/v1/embeddings", "no embeddings"),
        ("/v1/audio/transcriptions", "a transcript"),
        ("/v1/audio/speech", "a transcript"),
        ("/v1/images/generations", "makes none"),
        ("/v1/moderations", "judges no text"),
        ("/v1/files", "opticnerve batch"),
        ("/v1/files/file-1/content", "opticnerve batch"),
        ("/v1/batches", "opticnerve batch"),
        ("/v1/fine_tuning/jobs", "trains nothing"),
        ("/v1/assistants", "whole conversation"),
        ("/v1/threads/t/runs", "whole conversation"),
        ("/v1/chat/completions/chatcmpl-1", "whole conversation"),
        ("/api/generate", "/v1/chat/completions"),
        ("/v1/nothing", "there is no /v1/nothing here"),
        ("/chat/completions", "no /chat/completions here, but /v1/chat/completions"),
        ("/v1/v1/chat/completions", "but /v1/chat/completions"),
    ],
)
async def test_what_is_not_served(path, advice):
    async with stack(encoders=0, llms=0, ready=False) as s:
        for method in ("GET", "POST", "DELETE"):
            answer = await s.client.request(method, path, json={"model": "model"})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "not_served")
            assert error["type"] == "not_found_error" and error["param"] is None
            assert advice in error["message"] and "/v1/chat/completions" in error["message"]


async def test_anthropics_clients_take_a_base_url_without_v1():
    """The clients themselves add /v1; those that do not are told of it as OpenAI's are."""
    async with stack(encoders=0, llms=0, ready=False) as s:
        for path, advice in (
            ("/v1/v1/messages", "Anthropic's clients take the base URL without /v1"),
            ("/v1/v1/messages/count_tokens", "Anthropic's clients take the base URL without /v1"),
            ("/messages", "ends in /v1, once"),
        ):
            answer = await s.client.post(path, json={})
            told = answer.json()
            assert answer.status_code == 404 and told["type"] == "error"
            assert told["error"]["type"] == "not_found_error"
            assert advice in told["error"]["message"]
            assert told["request_id"] == answer.headers["request-id"]


async def test_a_path_that_is_no_websocket():
    async with stack(encoders=0, llms=0, ready=False) as s:
        url = str(s.client.base_url).replace("http", "ws", 1)
        for path in ("/v1/messages", "/v1/responses"):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"{url}{path}")
            answer = refused.value.response
            message = json.loads(answer.body)["error"]["message"]
            assert answer.status_code == 404 and f"{path} is no WebSocket" in message


async def test_the_body_is_not_waited_for():
    async with stack(encoders=0, llms=0, ready=False) as s, connected(s) as (reader, writer):
        head = "POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n\r\n"
        writer.write(head.encode())
        assert b" 404 " in await reader.readline()
        while (await reader.readline()).strip():
            pass
        told = json.loads(await reader.read(2**16))
        assert told["error"]["code"] == "not_served"


async def test_a_path_is_shown_in_part():
    async with stack(encoders=0, llms=0, ready=False) as s:
        answer = await s.client.get("/v1/" + "x" * 500 + "%1b")
        assert len(answer.json()["error"]["message"]) < 500
