"""Worker pools: states, choice by cost, waiting for a worker, names that move."""

import asyncio
import contextlib
import shutil
from dataclasses import replace

import pytest

from gateway.clock import Deadline
from gateway.workers import discovery
from gateway.workers import encode as encoders
from gateway.workers import generate as generation
from gateway.workers import pool as pools
from gateway.workers import worker as worker_module
from gateway.workers.dispatch import LeaseRequest
from gateway.workers.pairing import Pairing
from gateway.workers.pool import Changes, WorkerPool
from gateway.workers.worker import Description, Worker, WorkerState
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import (
    DeadlineExceeded,
    Mispaired,
    Overloaded,
    Unavailable,
    UnsupportedFeature,
)
from tests.checkpoints import make_checkpoint
from tests.fakes import PAIR_ID, FakeEncoder, FakeLLM, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]


@contextlib.asynccontextmanager
async def pool_of(*addresses, kind="encoder", changes=None):
    describe = encoders.describe_encoder if kind == "encoder" else generation.describe_llm
    pool = WorkerPool(kind, addresses, describe, changes)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def lent(pool, deadline, absence_s=60, **kind):
    """The address of the worker that a job of no great cost is lent."""
    async with pool.lease(LeaseRequest(1, deadline, **kind), absence_s) as worker:
        return worker.address


async def test_picks_the_least_pending_cost():
    async with FakeEncoder() as a, FakeEncoder() as b, pool_of(a.address, b.address) as pool:
        await until(lambda: len(pool.serving()) == 2)
        deadline = Deadline.after(60)
        async with (
            pool.lease(LeaseRequest(100, deadline), 60) as first,
            pool.lease(LeaseRequest(10, deadline), 60) as second,
        ):
            assert first is not second
            async with pool.lease(LeaseRequest(10, deadline), 60) as third:
                assert third is second
        assert [worker.pending for worker in pool.workers] == [0, 0]


async def test_equal_workers_take_turns():
    async with FakeEncoder() as a, FakeEncoder() as b, pool_of(a.address, b.address) as pool:
        await until(lambda: len(pool.serving()) == 2)
        deadline = Deadline.after(60)
        picked = [await lent(pool, deadline) for _ in range(4)]
        assert picked[0] != picked[1] and picked[:2] == picked[2:]


async def test_states_from_starting_over_serving_and_draining_to_dead():
    encoder = FakeEncoder()
    await encoder.start(serving=False)
    try:
        async with pool_of(encoder.address) as pool:
            (worker,) = pool.workers
            await until(lambda: worker.description.fingerprint == "enc-1")
            assert worker.state is WorkerState.STARTING
            await encoder.set_serving(True)
            await until(lambda: worker.state is WorkerState.SERVING)
            await encoder.die()
            pool.report_down(worker)
            await until(lambda: worker.state is WorkerState.DEAD)
            await encoder.start()
            await until(lambda: worker.state is WorkerState.SERVING)
    finally:
        await encoder.die()


class Listed:
    """A source whose addresses the test changes with ``list``."""

    kind = name = "registry"
    trouble = ""

    def __init__(self):
        self.lists = asyncio.Queue()

    def list(self, *addresses):
        self.lists.put_nowait(dict.fromkeys(addresses, ""))

    def keeps(self, said, instance_id):
        return False

    async def watch(self):
        while True:
            yield await self.lists.get()


async def test_a_process_is_asked_at_its_other_addresses_when_one_changes(monkeypatch):
    monkeypatch.setattr(worker_module, "POLL_SERVING_S", 600.0)  # Nothing is found by polling.
    asked, others = [], []

    async def describe(channel, timeout_s):
        asked.append(channel)
        found = await generation.describe_llm(channel, timeout_s)
        return replace(found, instance_id="cd" * 16) if channel in others else found

    async with FakeLLM() as llm:
        llm.instance_id = "ab" * 16
        name = llm.address.replace("127.0.0.1", "localhost")
        pool = WorkerPool("LLM", [], describe, registered=(source := Listed()))
        await pool.start()
        try:
            source.list(name, llm.address)
            await until(lambda: {w.state.value for w in pool.workers} == {"serving", "alias"})
            await asyncio.sleep(0.3)
            before = len(asked)
            await asyncio.sleep(0.3)
            assert len(asked) == before  # An alias is not asked more often than who serves.
            (serving,) = pool.serving()
            (alias,) = set(pool.workers) - {serving}
            source.list(alias.address)
            await until(lambda: pool.serving() == [alias])
            source.list(alias.address, serving.address)
            await until(lambda: pool.workers[-1].state is WorkerState.ALIAS)
            others.append(alias.channel)  # Another process took its place there.
            alias.wake.set()
            await until(lambda: len(pool.serving()) == 2)
        finally:
            await pool.close()


async def test_waits_for_a_worker_and_gives_up_after_a_while():
    encoder = FakeEncoder()
    await encoder.start()
    address = encoder.address
    await encoder.die()
    async with pool_of(address) as pool:
        with pytest.raises(Unavailable) as caught:
            await lent(pool, Deadline.after(60), absence_s=0.05)
        assert address in caught.value.message
        waiting = asyncio.create_task(lent(pool, Deadline.after(60)))
        await encoder.start()
        try:
            assert await waiting == address
        finally:
            await encoder.die()


async def test_without_addresses_nothing_is_waited_for():
    async with pool_of() as pool:
        with pytest.raises(Unavailable):
            await lent(pool, Deadline.after(60))


async def test_work_that_a_worker_refused_is_not_done():
    async with FakeLLM() as llm, pool_of(llm.address, kind="LLM") as pool:
        await until(pool.serving)
        throughput, deadline = pool.workers[0].throughput, Deadline.after(60)
        async with pool.lease(LeaseRequest(1, deadline), 60):
            await asyncio.sleep(0.1)
        before = throughput.per_s
        for _ in range(20):
            refused = LeaseRequest(1, deadline)
            async with pool.lease(refused, 60):
                refused.failed = True
            with pytest.raises(Overloaded):
                async with pool.lease(LeaseRequest(1, deadline), 60):
                    raise Overloaded("full")
        assert throughput.per_s == before
        assert pool.workers[0].pending == 0


async def test_avoided_workers_are_taken_only_when_nothing_else_serves():
    async with FakeEncoder() as a, pool_of(a.address) as pool:
        assert await lent(pool, Deadline.after(60), avoid={a.address}) == a.address


async def test_work_waits_for_room_in_the_order_of_its_deadlines():
    async with FakeEncoder() as a:
        a.max_batch_patches, a.patches_per_s = 10, 1000.0  # Three batches are 30.
        async with pool_of(a.address) as pool:
            await until(pool.serving)
            order = []

            async def job(name, seconds, cost=15):
                async with pool.lease(LeaseRequest(cost, Deadline.after(seconds)), 60):
                    order.append(name)
                    await asyncio.sleep(0)

            async with pool.lease(LeaseRequest(30, Deadline.after(60)), 60):
                jobs = [
                    asyncio.create_task(job(n, s)) for n, s in (("b", 70), ("c", 80), ("a", 60))
                ]
                left = asyncio.create_task(job("left", 65))
                late = asyncio.create_task(job("late", 0.05))
                await until(lambda: len(pool.dispatcher.waiting) == 4)  # The late one is gone.
                left.cancel()
                await until(lambda: len(pool.dispatcher.waiting) == 3)
                assert not order
            await asyncio.gather(*jobs)
            assert order == ["a", "b", "c"]
            with pytest.raises(DeadlineExceeded):
                await late
            assert pool.workers[0].pending == 0 and not pool.dispatcher.waiting


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        (("10.0.0.1", "10.0.0.2"), ["10.0.0.1", "10.0.0.2"]),
        (("[fd00::1]", "[fd00::2]", "10.0.0.1"), ["[fd00::1]", "[fd00::2]"]),
        (("[::1]", "127.0.0.1"), []),  # localhost.
        (("10.0.0.1",), []),
    ],
)
async def test_a_name_with_several_addresses_is_warned_of(hosts, told, monkeypatch, caplog):
    asked = []

    async def resolve(name):
        asked.append(name)
        return {f"{host}:7001" for host in hosts}

    monkeypatch.setattr(pools, "resolve", resolve)
    async with FakeEncoder() as encoder:
        name = encoder.address.replace("127.0.0.1", "localhost")
        async with pool_of(name) as pool:
            await until(lambda: asked)
            await until(lambda: pool.workers[0].state is WorkerState.SERVING)
    assert set(asked) == {name}
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if not told:
        assert not warnings
        return
    (warning,) = warnings
    assert f"write dns:///{name}" in warning and f"{len(told)} addresses" in warning
    assert all(f"{host}:7001" in warning for host in told)


async def test_what_waits_for_room_hears_when_every_worker_is_gone():
    async with FakeEncoder() as a:
        a.max_batch_patches, a.patches_per_s = 10, 1000.0
        async with pool_of(a.address) as pool:
            await until(pool.serving)
            async with pool.lease(LeaseRequest(30, Deadline.after(60)), 60) as worker:
                waiting = asyncio.create_task(lent(pool, Deadline.after(60), absence_s=0.05))
                await until(lambda: len(pool.dispatcher.waiting) == 1)
                await a.die()
                pool.report_down(worker)
                with pytest.raises(Unavailable):
                    await waiting


async def test_names_are_resolved_again(monkeypatch):
    monkeypatch.setattr(discovery, "RESOLVE_S", 0.01)
    async with FakeEncoder() as a, FakeEncoder() as b:
        found = {a.address}

        async def resolve(name):
            assert name == "encoders:9000"
            return set(found)

        monkeypatch.setattr(discovery, "resolve", resolve)
        async with pool_of("dns:///encoders:9000") as pool:
            await until(lambda: [w.address for w in pool.serving()] == [a.address])
            found.symmetric_difference_update({a.address, b.address})
            await until(lambda: [w.address for w in pool.serving()] == [b.address])


async def test_a_name_that_is_not_resolved_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(discovery, "RESOLVE_AGAIN_S", 0.01)
    asked = []

    async def resolve(name):
        asked.append(name)
        return None if len(asked) != 5 else set()

    monkeypatch.setattr(discovery, "resolve", resolve)
    async with pool_of("dns:///encoders:9000") as pool:
        await until(lambda: len(asked) > 9)
        assert pool.troubles == ["dns:///encoders:9000 is not resolved"]
        assert "is not resolved" in pool.absence()
    assert len(caplog.messages) == 2  # When it began, and when it began again.


async def test_resolves_addresses_of_a_name():
    assert "127.0.0.1:9000" in await discovery.resolve("localhost:9000")
    assert await discovery.resolve("no-such-name.invalid:1") is None


UNKNOWN = object()  # The gateway is still reading its weights.


@contextlib.asynccontextmanager
async def pairing_of(encoder_addresses, llm_addresses, own=PAIR_ID, wait=0.3):
    changes = Changes()
    async with (
        pool_of(*encoder_addresses, changes=changes) as some,
        pool_of(*llm_addresses, kind="LLM", changes=changes) as others,
    ):
        known = asyncio.get_running_loop().create_future()
        if own is not UNKNOWN:
            known.set_result(own)
        yield Pairing(some, others, known, worker_wait_s=wait)


async def test_no_worker_is_used_before_the_gateway_knows_its_own_checkpoint():
    async with (
        FakeEncoder() as encoder,
        FakeLLM() as llm,
        pairing_of([encoder.address], [llm.address], own=UNKNOWN, wait=20) as pairing,
    ):
        await until(lambda: pairing.encoders.serving() and pairing.llms.serving())
        assert pairing.best(pictures=True) is None
        assert "reading its checkpoint" in pairing.missing()[0]
        waiting = asyncio.create_task(pairing.choose(pictures=True, deadline=Deadline.after(20)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        pairing._own.set_result(PAIR_ID)
        assert (await waiting).pair_id == PAIR_ID
        assert pairing.missing() == []


async def test_pairs_only_what_belongs_together():
    other = "cd" * 32
    async with (
        FakeEncoder() as encoder,
        FakeEncoder("enc-other", other) as strange,
        FakeLLM() as llm,
        pairing_of([encoder.address, strange.address], [llm.address], own=None, wait=20) as pairing,
    ):
        await until(lambda: not pairing.missing())
        pair = await pairing.choose(pictures=True, deadline=Deadline.after(60))
        assert (pair.pair_id, pair.fingerprint) == (PAIR_ID, "enc-1")
        assert pair.max_model_len == 4096
        assert pair.system_fingerprint == "fp_" + PAIR_ID[:12]


async def test_gateways_choose_alike_among_equal_pairs():
    async with pairing_of([], [], own=None) as pairing:
        for pool in (pairing.encoders, pairing.llms):
            for pair in "hgfedcba":
                pool._workers[pair] = made = Worker(f"127.0.0.1:{ord(pair)}")
                made.state = WorkerState.SERVING
                made.description = Description(pair_id=pair, fingerprint=pair)
        for pictures in (True, False):
            assert pairing.best(pictures=pictures).pair_id == "a"


async def test_text_needs_no_encoder():
    async with FakeLLM() as llm, pairing_of([], [llm.address], wait=20) as pairing:
        pair = await pairing.choose(pictures=False, deadline=Deadline.after(60))
        assert pair.fingerprint == ""
        assert "encoder" in pairing.missing(pictures=True)[0] and not pairing.missing()
        with pytest.raises(UnsupportedFeature, match="--encoder-addresses"):
            await pairing.choose(pictures=True, deadline=Deadline.after(60))


async def test_workers_of_another_checkpoint_are_not_used():
    async with (
        FakeEncoder(pair_id="cd" * 32) as encoder,
        FakeLLM(pair_id="cd" * 32) as llm,
        pairing_of([encoder.address], [llm.address]) as pairing,
    ):
        await until(lambda: pairing.encoders.serving() and pairing.llms.serving())
        with pytest.raises(Mispaired):
            await pairing.choose(pictures=True, deadline=Deadline.after(60))
        assert pairing.missing()


async def test_workers_whose_weights_differ_in_one_byte_are_not_paired(tmp_path):
    one = make_checkpoint("qwen2_vl", tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    entry = next(iter(Checkpoint.open(str(other)).tensor_index().values()))
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        file.write(bytes([255 - entry.file.read_bytes()[entry.start]]))
    mine, theirs = (Checkpoint.open(str(path)).pair_id for path in (one, other))
    async with (
        FakeEncoder(pair_id=mine) as encoder,
        FakeLLM(pair_id=theirs) as llm,
        pairing_of([encoder.address], [llm.address], own=None) as pairing,
    ):
        await until(lambda: pairing.encoders.serving() and pairing.llms.serving())
        assert pairing.missing() == ["encoders and LLM workers serve different checkpoints"]
        with pytest.raises(Mispaired):
            await pairing.choose(pictures=True, deadline=Deadline.after(60))


async def test_a_known_encoder_that_is_down_still_names_embeddings():
    async with (
        FakeEncoder() as encoder,
        FakeLLM() as llm,
        pairing_of([encoder.address], [llm.address], wait=20) as pairing,
    ):
        await until(lambda: not pairing.missing())
        await encoder.die()
        pairing.encoders.report_down(pairing.encoders.workers[0])
        pair = await pairing.choose(pictures=True, deadline=Deadline.after(60))
        assert pair.fingerprint == "enc-1"
        assert "encoder" in pairing.missing()[0]
