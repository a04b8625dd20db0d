"""Encoding through a pool: single flight, references, retries, refusals."""

import asyncio
import contextlib
from dataclasses import replace

import pytest

from gateway.clock import Deadline
from gateway.workers import encode as encoding
from gateway.workers.embeddings import RequestEmbeddings
from gateway.workers.encode import Encodable, Encoders, References
from gateway.workers.pool import WorkerPool
from opticnerve.embeddings.ref import EmbeddingRef, Location, TensorSpec
from opticnerve.errors import (
    DeadlineExceeded,
    EmbeddingNotFound,
    InvalidMedia,
    Mispaired,
    Overloaded,
    PoisonousItem,
    Unavailable,
)
from opticnerve.media.plan import Grid, Modality, Overrides, Plan
from tests.fakes import FakeEncoder, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]


def item(key="a" * 64, data=b"x" * 10, fingerprint="enc-1"):
    plan = Plan(Modality.IMAGE, "png", 56, 56, 1, 56, 56, Grid(1, 4, 4), 4, 16)
    return Encodable(key, fingerprint, plan, Overrides(), data)


@contextlib.asynccontextmanager
async def over(*fakes, wait=20.0, limit=20.0):
    pool = WorkerPool("encoder", [fake.address for fake in fakes], encoding.describe_encoder)
    await pool.start()
    try:
        await until(lambda: len(pool.serving()) == len(fakes))
        yield Encoders(pool, limit, wait)
    finally:
        await pool.close()


def soon():
    return Deadline.after(60)


async def test_bytes_go_once_and_the_reference_is_kept():
    data = bytes(range(256)) * 10_000  # 2.5 MB: three chunks.
    async with FakeEncoder() as fake, over(fake) as encoders:
        first = await encoders.encode(item(data=data), soon(), "r1")
        assert (first.cached, first.bytes_sent) == ("no", len(data))
        assert first.timings["preprocess"] == 2
        assert fake.received == [data]
        assert fake.calls[0].plan.num_patches == 16 and fake.calls[0].request_id == "r1"
        second = await encoders.encode(item(data=data), soon(), "r2")
        assert (second.cached, second.bytes_sent, second.ref) == ("ref", 0, first.ref)
        assert len(fake.calls) == 1


async def test_one_call_serves_all_who_want_the_key_at_once():
    go = asyncio.Event()
    async with FakeEncoder() as fake, over(fake) as encoders:
        fake.script = lambda _: go.wait()
        both = [asyncio.create_task(encoders.encode(item(), soon(), f"r{i}")) for i in range(2)]
        await fake.started.wait()
        both[0].cancel()  # The one that began it leaves; the other keeps the call.
        go.set()
        assert (await both[1]).ref.key == "a" * 64
        assert len(fake.calls) == 1


async def test_the_last_one_to_leave_cancels_the_call():
    async with FakeEncoder() as fake, over(fake) as encoders:
        fake.script = lambda _: asyncio.Event().wait()
        task = asyncio.create_task(encoders.encode(item(), soon(), "r"))
        await fake.started.wait()
        task.cancel()
        async with asyncio.timeout(60):
            await fake.cancelled.wait()
        assert not encoders._runs
        assert encoders.pool.workers[0].pending == 0


async def test_a_joined_call_that_runs_out_of_its_own_time_is_made_again():
    async with FakeEncoder() as fake, over(fake) as encoders:
        hang = asyncio.Event().wait
        fake.script = lambda fake: hang() if len(fake.calls) == 1 else asyncio.sleep(0)
        for seconds in (0.2, 3.0, 20.0):
            hasty = asyncio.create_task(encoders.encode(item(), Deadline.after(seconds), "r1"))
            await until(lambda hasty=hasty: fake.started.is_set() or hasty.done())
            if fake.started.is_set():
                break
        patient = asyncio.create_task(encoders.encode(item(), soon(), "r2"))
        with pytest.raises(DeadlineExceeded):
            await hasty
        assert (await patient).ref.key == "a" * 64


async def test_an_encoder_that_dies_is_replaced_by_another_at_once(faults):
    async with FakeEncoder() as a, FakeEncoder() as b, over(a, b) as encoders:
        died = []

        async def die(fake):
            if not died:
                died.append(fake)
                await fake.die()

        a.script = b.script = die
        encoded = await encoders.encode(item(), soon(), "r")
        survivor = b if died == [a] else a
        assert encoded.ref.location.fetch_address == survivor.address
        assert len(a.calls) == len(b.calls) == 1
    assert faults(calls=False) == {("retries", "encode", "lost"): 1}


async def test_the_only_encoder_comes_back_within_the_deadline(faults):
    async with FakeEncoder() as fake, over(fake) as encoders:
        fake.script = lambda fake: fake.die()
        task = asyncio.create_task(encoders.encode(item(), soon(), "r"))
        await fake.started.wait()
        await until(lambda: fake.server is None)
        fake.script = None
        await fake.start()
        assert (await task).cached == "no"
        assert len(fake.calls) == 2
    assert faults(calls=False) == {("retries", "encode", "lost"): 1}


async def test_an_item_that_took_two_encoders_is_refused_the_third_time():
    fakes = FakeEncoder(), FakeEncoder(), FakeEncoder()
    async with fakes[0], fakes[1], fakes[2], over(*fakes) as encoders:
        for fake in fakes:
            fake.script = lambda fake: fake.die()
        with pytest.raises(Unavailable):
            await encoders.encode(item(), soon(), "r1")
        with pytest.raises(PoisonousItem):
            await encoders.encode(item(), soon(), "r2")
        assert sum(len(fake.calls) for fake in fakes) == 2


async def test_only_the_item_that_encoders_die_of_is_refused_of_all_that_they_had():
    """Each encoder that dies has others in flight, too: those are tried again one by one."""
    poison, innocent = "f" * 64, [f"{number:064}" for number in range(6)]
    restarts = []

    async def restart(fake):
        await until(lambda: fake.server is None)
        await fake.start()

    async def script(fake):
        if fake.calls[-1].key != poison:
            await asyncio.sleep(0.2)
        else:
            await until(lambda: fake.running > 2 or restarts)
            restarts.append(asyncio.create_task(restart(fake)))
            await fake.die()

    async with FakeEncoder() as a, FakeEncoder() as b, over(a, b) as encoders:
        a.script = b.script = script
        found = await asyncio.gather(
            *(encoders.encode(item(key), soon(), "r") for key in (*innocent, poison)),
            return_exceptions=True,
        )
        await asyncio.gather(*restarts)
        assert isinstance(found.pop(), Unavailable)
        assert [each.ref.key for each in found] == innocent
        assert len(restarts) == 2
        with pytest.raises(PoisonousItem):
            await encoders.encode(item(poison), soon(), "r")


async def test_a_full_encoder_sends_the_item_to_another(faults):
    async def full(_):
        raise Overloaded("full", retry_after_s=3)

    async with FakeEncoder() as a, FakeEncoder() as b, over(a, b) as encoders:
        a.script = full
        for i in range(4):
            assert (await encoders.encode(item(f"{i}" * 64), soon(), "r")).cached == "no"
        assert len(a.calls) == 1 and len(b.calls) == 4  # It gets none until it may have room.
    assert faults(calls=False) == {("retries", "encode", "full"): 1}


async def test_where_every_encoder_is_full_the_item_waits():
    async def full(fake):
        if len(fake.calls) < 4:
            raise Overloaded("full", retry_after_s=0.05)

    async with FakeEncoder() as fake, over(fake) as encoders:
        fake.script = full
        assert (await encoders.encode(item(), soon(), "r")).cached == "no"
        assert len(fake.calls) == 4
        fake.calls.clear()
        with pytest.raises(DeadlineExceeded):
            await encoders.encode(item("b" * 64), Deadline.after(0.1), "r")


@pytest.mark.slow
async def test_a_slow_encoder_has_no_more_than_it_can_encode_in_one_calls_time(monkeypatch):
    """The rest waits here until the request's deadline, instead of there until the call's."""
    monkeypatch.setattr(encoding, "MAX_IN_FLIGHT_S", 0.5)
    one_by_one = asyncio.Lock()

    async def slow(_):
        async with one_by_one:
            await asyncio.sleep(0.1)

    async with FakeEncoder() as fake:
        fake.patches_per_s = 160.0  # Ten items a second; the fake's batch has 256 of them.
        async with over(fake, limit=2.0) as encoders:
            fake.script = slow
            items = [item(f"{i:064d}") for i in range(40)]  # Four seconds.
            done = await asyncio.gather(*(encoders.encode(each, soon(), "r") for each in items))
            assert len(done) == len(fake.calls) == 40 and fake.most_running == 5


async def test_what_would_wait_too_long_is_refused_when_it_comes():
    go = asyncio.Event()
    async with FakeEncoder() as fake:
        fake.patches_per_s, fake.max_batch_patches = 16.0, 6  # One item a second, one at a time.
        async with over(fake) as encoders:
            encoders.max_wait_s = 3.0
            fake.script = lambda _: go.wait()
            items = [item(f"{i}" * 64) for i in range(4)]
            running = [asyncio.create_task(encoders.encode(each, soon(), "r")) for each in items]
            await fake.started.wait()
            assert len(encoders.pool.dispatcher.waiting) == 3
            with pytest.raises(Overloaded, match=r"is 4\.0 s") as caught:
                encoders.admit([item("9" * 64)], soon())
            encoders.leave("9" * 64)
            assert caught.value.retry_after_s == pytest.approx(1.0)
            encoders.admit([items[3]], soon())  # Under way: it takes nobody's time.
            encoders.max_wait_s = 0.0
            encoders.admit([item("9" * 64)], soon())
            encoders.leave("9" * 64)
            with pytest.raises(Overloaded):  # It could not begin before its own deadline.
                encoders.admit([item("9" * 64)], Deadline.after(2.0))
            go.set()
            await asyncio.gather(*running)
            encoders.admit(items, Deadline.after(0))  # Known by reference.


async def test_a_key_does_not_wait_for_all_pictures_of_another():
    """Its picture is among the next that are encoded, and is not refused for the others' sake."""
    go = asyncio.Event()
    async with FakeEncoder() as fake:
        fake.patches_per_s, fake.max_batch_patches = 16.0, 6  # One item a second, one at a time.
        async with over(fake) as encoders:
            encoders.max_wait_s = 5.0
            fake.script = lambda _: go.wait()
            flood = [replace(item(f"{i:064d}"), share="mallory") for i in range(30)]
            running = [asyncio.create_task(encoders.encode(each, soon(), "r")) for each in flood]
            await fake.started.wait()
            assert len(encoders.pool.dispatcher.waiting) == 29
            victim = replace(item("a" * 64), share="ada")
            with pytest.raises(Overloaded):
                encoders.admit([replace(item("b" * 64), share="mallory")], soon())
            encoders.admit([victim], soon())
            running.append(asyncio.create_task(encoders.encode(victim, soon(), "r")))
            await until(lambda: len(encoders.pool.dispatcher.waiting) == 30)
            go.set()
            await asyncio.gather(*running)
            assert [call.key for call in fake.calls].index(victim.key) <= 2


async def test_an_encoder_that_has_another_fingerprint_by_now_is_left(faults):
    async def changed(_):
        raise Mispaired("another fingerprint")

    async with FakeEncoder() as a, FakeEncoder() as b, over(a, b) as encoders:
        a.script = changed
        for i in range(2):
            assert (await encoders.encode(item(f"{i}" * 64), soon(), "r")).cached == "no"
        assert len(b.calls) == 2
    assert faults(calls=False) == {("retries", "encode", "mispaired"): len(a.calls)}


async def test_bad_media_is_the_clients_error_at_once():
    async def refuse(_):
        raise InvalidMedia("no picture")

    async with FakeEncoder() as a, FakeEncoder() as b, over(a, b) as encoders:
        a.script = b.script = refuse
        with pytest.raises(InvalidMedia, match="no picture"):
            await encoders.encode(item(), soon(), "r")
        assert len(a.calls) + len(b.calls) == 1


async def test_an_encoder_that_hangs_is_left_at_its_own_deadline():
    async with FakeEncoder() as fake, over(fake, limit=0.1) as encoders:
        fake.script = lambda _: asyncio.Event().wait()
        with pytest.raises(DeadlineExceeded):
            await encoders.encode(item(), soon(), "r")


async def test_only_encoders_with_the_fingerprint_are_asked():
    async with FakeEncoder("enc-1") as a, FakeEncoder("enc-2") as b, over(a, b) as encoders:
        for i in range(4):
            await encoders.encode(item(f"{i}" * 64, fingerprint="enc-2"), soon(), "r")
        assert not a.calls and len(b.calls) == 4


async def test_a_requests_items_are_encoded_at_once_and_each_once():
    go = asyncio.Event()
    async with FakeEncoder() as a, FakeEncoder() as b, over(a, b) as encoders:
        a.script = b.script = lambda _: go.wait()
        items = [item("1" * 64), item("2" * 64), item("1" * 64)]
        async with RequestEmbeddings(encoders, items, "r", soon()) as embeddings:
            await a.started.wait()
            await b.started.wait()
            go.set()
            refs = [await embeddings.ready(entry.key) for entry in items]
            assert [ref.key[0] for ref in refs] == ["1", "2", "1"]
            assert embeddings.bytes_sent == 20
            assert embeddings.known("1" * 64) == refs[0]


async def test_what_was_lost_is_encoded_again_but_not_for_ever(faults):
    async with FakeEncoder() as fake, over(fake) as encoders:
        key = "1" * 64
        async with RequestEmbeddings(encoders, [item(key)], "r", soon()) as embeddings:
            await embeddings.ready(key)
            await embeddings.again(key, "NOT_FOUND")
            await embeddings.again(key, "PREEMPTED")
            await embeddings.again(key, "CORRUPT")
            assert [call.lost for call in fake.calls] == [False, True, True, True]
            with pytest.raises(EmbeddingNotFound):
                await embeddings.again(key, "EVICTED")
    reasons = "not_found", "preempted", "corrupt"
    assert faults() == {("reencodes", reason): 1 for reason in reasons}


async def test_leaving_a_request_cancels_its_encoding():
    async with FakeEncoder() as fake, over(fake) as encoders:
        fake.script = lambda _: asyncio.Event().wait()
        async with RequestEmbeddings(encoders, [item()], "r", soon()):
            await fake.started.wait()
        async with asyncio.timeout(60):
            await fake.cancelled.wait()


def ref(key, **location):
    return EmbeddingRef(key, "f", (TensorSpec("rows", "BF16", (4, 8)),), 4, Location(**location))


async def test_references_are_bounded_and_hold_no_rows():
    references = References(capacity=2)
    for key in "abc":
        references.remember(ref(key, redis=True, inline=b"rows"))
        references.get("a")
    assert references.get("b") is None and len(references) == 2
    assert references.get("a").location.inline == b""
    references.remember(ref("d", inline=b"rows"))
    assert references.get("d") is None
