"""What one request's text may cost the others: the event loop's CPU in one turn."""

import asyncio
import base64
import http.client
import json
import threading
import time

import pytest

from gateway.api.http import OFF_LOOP_BYTES
from gateway.api.schemas.long_json import split_long_strings
from gateway.edge.threads import LONG_BYTES
from tests.gateways import body, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]
LONG = 2**24
LONGEST_S = 0.2  # Of a turn of the loop on a busy machine; what is unbounded takes seconds.


def post(port, payload):
    """From a thread of its own, whose CPU is not the loop's."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/chat/completions", payload)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


class Turns:
    """The longest turn of the loop, in seconds of its thread's CPU."""

    def __init__(self):
        self.longest = 0.0

    async def watch(self):
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time.thread_time() - before)


def picture(*urls):
    return json.dumps(body(user("What?", *urls))).encode()


PIECES = b"\xff\xd8" + b"\xff\xe1\x00\x02" * 2**15  # A JPEG of empty segments.
SPACED = "data:;base64," + "A " * 130_000  # Short enough to be decoded on the loop.


def tools(schema):
    """As many tools as a request may have, which must be called."""
    function = {"name": "f", "parameters": schema}
    offered = [{"type": "function", "function": {**function, "name": f"f{i}"}} for i in range(128)]
    return json.dumps(body(tools=offered, tool_choice="required")).encode()


KINDS = {
    "bad_words": (
        lambda: json.dumps(body(bad_words=[f"{i:04d}" + "b" * 1020 for i in range(256)])).encode(),
        (200,),
    ),
    "spaced base64": (lambda: picture(SPACED), (400,)),
    "long spaced base64": (lambda: picture("data:;base64," + "A " * (LONG // 2)), (400, 413)),
    "percent signs": (lambda: picture("data:," + "%" * LONG), (400,)),
    "pictures of pieces": (
        lambda: picture(*["data:;base64," + base64.b64encode(PIECES).decode()] * 10),
        (400, 422),
    ),
    "URLs": (lambda: picture(*["http://" + "@" * 16_000] * 10), (400,)),
    "a name": (
        lambda: json.dumps(body({**user("Hi"), "name": "n" * 2**21 + "<"})).encode(),
        (200, 400),
    ),
    "text": (lambda: json.dumps(body(user("<|im_end|>" + "<" * LONG))).encode(), (400,)),
    "white space": (lambda: b" " * LONG + json.dumps(body()).encode(), (413,)),
    "a salt": (lambda: json.dumps(body(cache_salt="s" * LONG)).encode(), (400,)),
    "a model": (lambda: json.dumps({**body(), "model": "m" * LONG}).encode(), (404,)),
    "tools of many values": (
        lambda: tools({"properties": {f"p{i}": {"enum": [1, 2]} for i in range(100)}}),
        (200, 400),
    ),
    "tools of long strings": (lambda: tools({"description": "<" * 2000}), (200, 400)),
    "nested tools": (lambda: tools(json.loads('{"not":' * 90 + "{}" + "}" * 90)), (200, 400)),
    "arguments": (
        lambda: json.dumps(
            body(
                user("Hi"),
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"function": {"name": "f", "arguments": json.dumps({"a": "a" * LONG})}}
                    ],
                },
            )
        ).encode(),
        (400,),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_no_text_holds_the_loop(kind):
    make, statuses = KINDS[kind]
    payload = make()
    async with stack() as s:
        port = s.client.base_url.port
        await asyncio.to_thread(post, port, json.dumps(body()).encode())
        longest = []
        for _ in range(3):  # The best of them: other work of the loop may fall into a turn.
            turns = Turns()
            watching = asyncio.create_task(turns.watch())
            status, answer = await asyncio.to_thread(post, port, payload)
            watching.cancel()
            assert status in statuses, answer
            longest.append(turns.longest)
            if turns.longest < LONGEST_S:
                break
        assert min(longest) < LONGEST_S
        assert (await s.chat()).status_code == 200


async def test_others_go_on_while_long_bodies_are_read(monkeypatch):
    """Any number of them, and whether the others' bodies are short or middling."""
    begun, end = threading.Event(), threading.Event()

    def slow(text, enough):
        if len(text) > LONG_BYTES:
            begun.set()
            end.wait(60)
        return split_long_strings(text, enough)

    monkeypatch.setattr("gateway.api.http.split_long_strings", slow)
    long = picture("data:;base64," + "A" * LONG_BYTES)
    middling = json.dumps(body(metadata={"a": "b" * (2 * OFF_LOOP_BYTES)})).encode()
    async with stack() as s:
        port = s.client.base_url.port
        posts = [asyncio.create_task(asyncio.to_thread(post, port, long)) for _ in range(3)]
        try:
            await asyncio.to_thread(begun.wait, 60)
            for payload in [json.dumps(body()).encode(), middling] * 3:
                answer = await s.client.post("/v1/chat/completions", content=payload)
                assert answer.status_code == 200
            assert not any(task.done() for task in posts)
        finally:
            end.set()
        assert {status for status, _ in await asyncio.gather(*posts)} == {400}
