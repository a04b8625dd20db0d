"""What the key file allows a key: requests in a time, requests in flight, and names of models."""

import asyncio
from pathlib import Path

import pytest

from gateway.edge.auth import Keys
from tests.fakes import until
from tests.gateways import data_url, stack
from tests.integration.test_realtime import session

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]

KEY_FILE = """\
ada: sk-ada rate=2/h
bob: sk-bob concurrency=1
eve: sk-eve models=second
mallory: sk-mallory models=third
"""
NAMES = ("first", "second")


def of(name):
    return {"authorization": f"Bearer sk-{name}"}


def read_again(keys, text):
    Path(keys.path).write_text(text)
    keys.reread()


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(KEY_FILE)
    return Keys.load(str(path))


async def test_beyond_its_rate_a_key_is_told_when_to_come_again(keys):
    async with stack(keys=keys, host="127.0.0.1") as s:
        for left in ("1", "0"):
            answer = await s.chat(headers=of("ada"))
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
        refused = await s.chat(headers=of("ada"), stream=True)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert 1790 <= int(refused.headers["retry-after"]) <= 1800
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        reset = refused.headers["x-ratelimit-reset-requests"]
        assert reset.startswith("59m") or reset == "1h0m0s"
        assert len(s.llm.starts) == 2
        listed = await s.client.get("/v1/models", headers=of("ada"))
        assert listed.status_code == 200  # Requests without a body are not counted.
        messages = await s.client.post(
            "/v1/messages",
            json={
                "model": "model",
                "max_tokens": 4,
                "messages": [{"role": "user", "content": "?"}],
            },
            headers=of("ada"),
        )
        assert messages.status_code == 429
        assert messages.json()["error"]["type"] == "rate_limit_error"
        other = await s.chat(headers=of("bob"))
        assert other.status_code == 200 and "x-ratelimit-limit-requests" not in other.headers


async def test_a_key_that_stays_keeps_its_count_when_the_file_is_read_again(keys):
    async with stack(keys=keys, host="127.0.0.1") as s:
        for _ in range(2):
            assert (await s.chat(headers=of("ada"))).status_code == 200
        read_again(keys, KEY_FILE + "new: sk-new\n")
        assert (await s.chat(headers=of("new"))).status_code == 200
        assert (await s.chat(headers=of("ada"))).status_code == 429


async def test_requests_in_flight_of_a_key_are_bounded(keys):
    async with stack(keys=keys, host="127.0.0.1") as s:
        release = asyncio.Event()

        async def hold(llm, index):
            await release.wait()

        s.llm.step = hold
        first = asyncio.create_task(s.chat(headers=of("bob")))
        await until(lambda: s.llm.running)
        refused = await s.chat(headers=of("bob"))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"
        release.set()
        assert (await first).status_code == 200
        assert (await s.chat(headers=of("bob"))).status_code == 200


async def test_each_response_of_a_realtime_session_is_a_request(keys):
    async with (
        stack(keys=keys, host="127.0.0.1") as s,
        session(s, additional_headers=of("ada")) as client,
    ):
        await client.user("What is this?", {"image_url": data_url()})
        statuses = []
        for _ in range(3):
            await client.send("response.create")
            done = (await client.event("response.done"))["response"]
            statuses.append(done["status"])
        assert statuses == ["completed", "completed", "failed"]
        assert done["status_details"]["error"]["code"] == "rate_limit_exceeded"


async def test_other_models_are_to_a_key_as_if_they_were_not_served(keys):
    async with stack(keys=keys, host="127.0.0.1", served_model_name=NAMES) as s:
        for name, seen in (("ada", list(NAMES)), ("eve", ["second"]), ("mallory", [])):
            listed = (await s.client.get("/v1/models", headers=of(name))).json()["data"]
            assert [card["id"] for card in listed] == seen
            assert all(card["root"] == "first" for card in listed)
            for model in NAMES:
                answer = await s.chat(headers=of(name), model=model)
                card = await s.client.get(f"/v1/models/{model}", headers=of(name))
                if model in seen:
                    assert answer.status_code == card.status_code == 200
                else:
                    assert answer.status_code == card.status_code == 404
                    assert answer.json()["error"]["code"] == "model_not_found"
                    assert "third" not in answer.text


async def test_a_realtime_session_is_bound_to_the_key_s_models(keys):
    async with stack(keys=keys, host="127.0.0.1", served_model_name=NAMES) as s:
        query = "?model=second"
        async with session(s, query, additional_headers=of("eve")) as client:
            await client.send("session.update", session={"type": "realtime", "model": "first"})
            error = (await client.event("error"))["error"]
            assert (error["code"], error["param"]) == ("model_not_found", "session.model")
