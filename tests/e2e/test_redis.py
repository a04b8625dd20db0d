"""The store of many machines: embeddings cross Redis, and requests outlive it."""

import pytest
import redis

import opticnerve
from opticnerve.secret import make_secret
from tests.e2e.conftest import user
from tests.e2e.processes import ask, picture
from tests.redis import PATIENT, RedisServer, find_redis_server

pytestmark = pytest.mark.skipif(
    find_redis_server() is None, reason="redis-server is not installed: make programs"
)
STAR = "A large red star in the center."


def store(server, directory):
    """The URL of Redis with a local tier that no other process of this user shares."""
    return f"{server.url}?local=shm://{directory}&{PATIENT}"


def test_requests_go_on_when_redis_stops_and_when_it_returns(tmp_path):
    with (
        RedisServer() as server,
        opticnerve.serve(dtype="float32", store=store(server, tmp_path / "tier")) as stack,
    ):
        assert ask(stack, picture(800)) == STAR
        keys = redis.Redis(port=server.port).keys("*")
        assert len(keys) == 1 and keys[0].startswith(b"on:v2:emb:")  # Signed.
        server.stop()
        assert ask(stack, picture(800)) == STAR
        assert [ask(stack, picture(seed)) for seed in range(801, 804)] == [STAR] * 3
        server.start()
        assert ask(stack, picture(804)) == STAR


def test_embeddings_in_redis_outlive_the_stack_under_one_secret(tmp_path):
    key_file = make_secret(tmp_path, "secret")
    with RedisServer() as server:
        for cached in ("no", "store"):
            url = store(server, tmp_path / cached)
            with opticnerve.serve(dtype="float32", store=url, store_key_file=key_file) as stack:
                body = {
                    "model": "model",
                    "messages": [user("What do you see?", picture(810))],
                    "temperature": 0,
                    "timings": True,
                }
                answer = stack._http.post("/v1/chat/completions", json=body).json()
                assert answer["choices"][0]["message"]["content"] == STAR
                assert answer["timings"]["items"][0]["cached"] == cached
