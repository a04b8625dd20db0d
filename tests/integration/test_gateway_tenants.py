"""What a key may do, and what its holder learns of others: a gateway with keys."""

import asyncio

import pytest

from gateway.edge.auth import Keys
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.content_keys import tenant_salt
from tests import encoders, llms
from tests.encoders import FakeBackend
from tests.gateways import body, data_url, over, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]

KEY_FILE = """\
ada: sk-ada tenant=acme
eve: sk-eve tenant=acme priority=-10
bob: sk-bob priority=5 weight=2.5
"""


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(KEY_FILE)
    return Keys.load(str(path))


def of(name):
    return {"authorization": f"Bearer sk-{name}"}


async def test_requests_run_at_what_their_key_may_use(keys):
    async with stack(keys=keys, host="127.0.0.1") as s:
        for name, asked, runs_at in (
            ("ada", {}, 0), ("ada", {"priority": 3}, 3), ("eve", {"priority": -10}, -10),
            ("bob", {}, 5), ("bob", {"priority": None}, 5), ("bob", {"priority": 6}, 6),
        ):  # fmt: skip
            assert (await s.chat(headers=of(name), **asked)).status_code == 200
            assert s.llm.starts[-1].priority == runs_at, (name, asked)
        count = len(s.llm.starts)
        for name, asked in (("ada", -1), ("eve", -11), ("bob", 0)):
            for stream in (False, True):
                answer = await s.chat(headers=of(name), priority=asked, stream=stream)
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == "priority"
        assert len(s.llm.starts) == count


async def test_without_keys_nobody_goes_before_others():
    async with stack() as s:
        assert (await s.chat(priority=-1)).status_code == 400
        assert (await s.chat(priority=2)).status_code == 200
        assert [start.priority for start in s.llm.starts] == [2]


async def test_requests_of_a_key_share_the_decoder_under_its_name_and_weight(keys):
    async with stack(keys=keys, host="127.0.0.1") as s:
        for name, weight in (("ada", 1.0), ("eve", 1.0), ("bob", 2.5)):
            assert (await s.chat(headers=of(name))).status_code == 200
            start = s.llm.starts[-1]
            assert (start.share, start.weight) == (name, weight)


async def test_without_keys_each_request_has_a_share_of_its_own():
    async with stack() as s:
        assert (await s.chat()).status_code == 200
        assert (s.llm.starts[-1].share, s.llm.starts[-1].weight) == ("", 1.0)


async def test_more_choices_than_allowed_are_refused_before_anything_is_done():
    async with stack(max_n=2) as s:
        assert (await s.chat(n=2)).status_code == 200
        answer = await s.chat(n=3)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "n"
        assert "--max-n" in answer.json()["error"]["message"]
        assert len(s.llm.starts) == 1


# ---- what is told of others


class Told:
    """What an answer tells its caller of caches."""

    def __init__(self, answer):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        timings = found["timings"]
        self.tokens = found["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.pictures = [item["cached"] for item in timings["items"]]
        self.sent = timings["bytes_to_encoders"]

    @property
    def anything(self):
        return bool(self.tokens) or self.pictures != ["no"] or not self.sent


@pytest.fixture
async def workers(tmp_path):
    """A real encoder with a backend that counts, and a real LLM worker."""
    backend = FakeBackend(hidden_size=192)
    pair_id = Checkpoint.open(None).pair_id
    async with (
        encoders.running(tmp_path / "encoder", backend=backend, pair_id=pair_id) as encoder,
        llms.running(tmp_path / "llm") as llm,
    ):
        yield encoder, llm


def over_workers(workers, keys, **settings):
    encoder, llm = workers
    return over(encoder.server.address, llm.server.address, keys, **settings)


async def ask(client, name, **fields):
    """A question about one and the same picture, with a text of several pages of the cache."""
    message = user("What is this, and what is it not? " * 8, data_url("red"))
    asked = body(message, max_tokens=1, temperature=0, timings=True, **fields)
    return Told(await client.post("/v1/chat/completions", json=asked, headers=of(name)))


async def test_a_tenant_is_told_of_its_own_requests_alone(workers, keys):
    encoder, _ = workers
    async with asyncio.timeout(200), over_workers(workers, keys) as client:
        assert not (await ask(client, "ada")).anything
        own = await ask(client, "ada")
        assert own.tokens and own.pictures == ["ref"] and not own.sent
        other = await ask(client, "bob")
        assert not other.anything
        assert sum(encoder.backend.batches) == 2  # Its time tells no more than its answer.
        same = await ask(client, "eve")  # Of ada's tenant.
        assert same.tokens and same.pictures == ["ref"]


async def test_no_salt_of_ones_own_opens_the_cache_of_another(workers, keys):
    async with asyncio.timeout(200), over_workers(workers, keys) as client:
        assert not (await ask(client, "ada")).anything
        assert not (await ask(client, "ada", cache_salt="x")).anything
        assert (await ask(client, "eve", cache_salt="x")).tokens
        for salt in ("acme", "x", tenant_salt("acme", ""), tenant_salt("acme", "x")):
            assert not (await ask(client, "bob", cache_salt=salt)).anything, salt


async def test_another_gateway_of_the_same_store_tells_no_more(workers, keys):
    """Its own list of references is empty: what the encoder says is salted too."""
    encoder, _ = workers
    async with asyncio.timeout(200):
        async with over_workers(workers, keys) as client:
            assert not (await ask(client, "ada")).anything
        async with over_workers(workers, keys) as client:
            assert not (await ask(client, "bob")).anything
            assert (await ask(client, "ada")).tokens
        assert sum(encoder.backend.batches) == 2


async def test_a_shared_cache_is_shared_by_all(workers, keys):
    encoder, _ = workers
    async with asyncio.timeout(200), over_workers(workers, keys, share_cache=True) as client:
        assert not (await ask(client, "ada")).anything
        shared = await ask(client, "bob")
        assert shared.tokens and shared.pictures == ["ref"] and not shared.sent
        assert not (await ask(client, "bob", cache_salt="x")).anything
        assert sum(encoder.backend.batches) == 2


async def test_without_keys_all_share(workers):
    encoder, _ = workers
    async with asyncio.timeout(200), over_workers(workers, None) as client:
        assert not (await ask(client, "ada")).anything
        assert (await ask(client, "bob")).tokens
        assert sum(encoder.backend.batches) == 1


async def test_one_picture_at_once_is_two_calls_of_two_tenants(keys):
    """Nobody joins another tenant's encode: its end would tell when that began."""
    async with stack(keys=keys, host="127.0.0.1") as s:
        message = user("What?", data_url())
        names = ("ada", "eve", "bob")
        answers = await asyncio.gather(*(s.chat(message, headers=of(name)) for name in names))
        assert [answer.status_code for answer in answers] == [200] * 3
        assert len({header.key for header in s.encoder.calls}) == len(s.encoder.calls) == 2


async def test_a_picture_is_not_named_without_its_bytes(keys):
    async with stack(keys=keys, host="127.0.0.1") as s:
        whole = {"type": "image_url", "image_url": {"url": data_url()}, "uuid": "a-1"}
        asked = {"role": "user", "content": [whole]}
        assert (await s.chat(asked, headers=of("ada"))).status_code == 200
        key = s.encoder.calls[0].key
        for name in (key, "a-1"):
            bare = {
                "role": "user",
                "content": [{"type": "image_url", "image_url": None, "uuid": name}],
            }
            assert (await s.chat(bare, headers=of("ada"))).status_code == 400
            assert (await s.chat(bare, headers=of("bob"))).status_code == 400
        assert len(s.encoder.calls) == len(s.llm.starts) == 1


async def test_a_salt_is_bounded():
    async with stack() as s:
        answer = await s.chat(cache_salt="x" * 1025)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "cache_salt"
        assert (await s.chat(cache_salt="x" * 1024)).status_code == 200
        assert (await s.chat()).status_code == 200
        assert [len(start.cache_salt) for start in s.llm.starts] == [64, 0]
