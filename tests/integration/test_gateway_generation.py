"""A generation that outlives its workers: no token lost, none twice, everything freed."""

import asyncio
import contextlib

import pytest

from gateway.clock import Deadline
from gateway.workers import generate as generation
from gateway.workers.generate import FailoverGeneration, GenerateSpec
from gateway.workers.pool import WorkerPool
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    DeviceLost,
    EngineFailure,
    InvalidMedia,
    Overloaded,
    Unavailable,
)
from opticnerve.generation.generate_stream import StreamPolicy
from opticnerve.generation.values import Delta, Done, FinishReason, Sampling
from opticnerve.media.plan import Grid, Modality, Span
from opticnerve.pb import llm_pb2
from tests.fakes import PAIR_ID, FakeLLM, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]
KEY = "e" * 64


class Refs:
    """References by hand: ``ready`` waits for ``give``."""

    def __init__(self, known=False):
        self.given = asyncio.get_running_loop().create_future()
        self.asked_again = []
        if known:
            self.give()

    def give(self):
        self.given.set_result(EmbeddingRef(KEY, "f", (), 4, Location(redis=True)))

    def known(self, key):
        return self.given.result() if self.given.done() else None

    async def ready(self, key):
        return await asyncio.shield(self.given)

    async def again(self, key, reason):
        self.asked_again.append((key, reason))
        return await self.ready(key)


def spec(pictures=0, n=1, max_tokens=100):
    spans = tuple(Span(2 + 4 * i, 4, 0, 0, Modality.IMAGE, Grid(1, 4, 4)) for i in range(pictures))
    sampling = Sampling(max_tokens=max_tokens, n=n)
    keys = (KEY,) if pictures else ()
    return GenerateSpec("r", tuple(range(12)), spans, keys, sampling, PAIR_ID)


@contextlib.asynccontextmanager
async def over(*fakes):
    pool = WorkerPool("LLM", [fake.address for fake in fakes], generation.describe_llm)
    await pool.start()
    try:
        await until(lambda: len(pool.serving()) == len(fakes))
        yield pool
    finally:
        await pool.close()


async def collect(pool, what, refs=None, deadline=20.0, wait=20.0, tokens=None):
    """(token ids by choice, the last event); ``tokens`` fills as they come, where it is given."""
    made = FailoverGeneration(what, pool, refs or Refs(), Deadline.after(deadline), wait)
    tokens, last = {} if tokens is None else tokens, None
    async with contextlib.aclosing(made.events()) as events:
        async for event in events:
            last = event
            if isinstance(event, Delta):
                ids = tokens.setdefault(event.choice, [])
                assert event.first_index == len(ids)
                ids.extend(event.token_ids)
    return tokens, last


async def test_tokens_usage_and_timings():
    async with FakeLLM([5, 6, 7]) as llm, over(llm) as pool:
        tokens, last = await collect(pool, spec())
        assert tokens == {0: [5, 6, 7]}
        assert isinstance(last, Done)
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (12, 3)
        assert last.timings.prefill_ms == 2
        assert pool.workers[0].pending == 0


async def test_a_known_reference_travels_with_start():
    async with FakeLLM() as llm, over(llm) as pool:
        await collect(pool, spec(pictures=2), Refs(known=True))
        assert llm.starts[0].items[0].ref.location.redis
        assert [span.token_offset for span in llm.starts[0].spans] == [2, 6]
        assert len(llm.refs) == 1


async def test_a_reference_that_comes_later_is_sent_when_it_comes():
    async with FakeLLM() as llm, over(llm) as pool:
        refs = Refs()
        task = asyncio.create_task(collect(pool, spec(pictures=1), refs))
        await llm.started.wait()
        refs.give()
        tokens, _ = await task
        assert tokens == {0: [1, 2, 3]}
        assert not llm.starts[0].items[0].HasField("ref")
        assert llm.refs[0].key == KEY


async def test_rows_that_the_worker_misses_are_had_again():
    async with FakeLLM() as llm, over(llm) as pool:
        llm.asks_again = 2
        refs = Refs(known=True)
        tokens, _ = await collect(pool, spec(pictures=1), refs)
        assert tokens == {0: [1, 2, 3]}
        assert refs.asked_again == [(KEY, "EVICTED")] * 2


@pytest.mark.parametrize("worker_reacts", [True, False])
async def test_an_item_that_will_not_come_fails_the_request_as_it_failed(
    worker_reacts, monkeypatch
):
    policy = StreamPolicy(fail_grace_s=20 if worker_reacts else 0.01)
    monkeypatch.setattr(generation, "STREAM_POLICY", policy)
    async with FakeLLM() as llm, over(llm) as pool:
        refs = Refs()
        if not worker_reacts:
            monkeypatch.setattr(llm, "_next_ref", lambda inbox: asyncio.Event().wait())
        task = asyncio.create_task(collect(pool, spec(pictures=1), refs))
        await llm.started.wait()
        refs.given.set_exception(InvalidMedia("no picture", param="messages[0]"))
        with pytest.raises(InvalidMedia) as caught:
            await task
        assert caught.value.param == "messages[0]"
        await until(lambda: llm.running == 0)
        if worker_reacts:
            assert llm.failures[0].key == KEY


async def test_lost_before_the_first_token_and_sent_again(faults):
    async with FakeLLM() as a, FakeLLM() as b, over(a, b) as pool:
        died = []

        async def die(fake, index):
            if not died:
                died.append(fake)
                await fake.die()

        a.step = b.step = die
        tokens, _ = await collect(pool, spec(pictures=1), Refs(known=True))
        assert tokens == {0: [1, 2, 3]}
        again = (b if died == [a] else a).starts[0]
        assert list(again.outputs) == [] and again.items[0].HasField("ref")
    assert faults(calls=False) == {("retries", "generate", "lost"): 1}


async def test_lost_in_the_middle_and_continued_elsewhere(faults):
    ids = list(range(100, 120))
    async with FakeLLM(ids) as a, FakeLLM(ids) as b, over(a, b) as pool:
        died, tokens = [], {}

        async def die(fake, index):
            if index == 7 and not died:
                died.append(fake)
                await until(lambda: tokens)  # What is on its way may be lost with the connection.
                await fake.die()

        a.step = b.step = die
        _, last = await collect(pool, spec(), tokens=tokens)
        assert tokens == {0: ids}
        assert last.usage.completion_tokens == 20
        again = (b if died == [a] else a).starts[0]
        (output,) = again.outputs
        sent = list(output.output_ids)
        assert sent == ids[: len(sent)] and 0 < len(sent) <= 7
        assert (output.choice, output.finished) == (0, False)
    assert faults(calls=False) == {("failovers",): 1}


async def test_workers_that_drain_one_after_another_hand_the_generation_on(faults):
    """A worker that says it is stopping is not one that the request took with it."""
    ids = list(range(100, 120))
    async with FakeLLM(ids) as a, FakeLLM(ids) as b, FakeLLM(ids) as c, FakeLLM(ids) as d:
        stopped, tokens = [], {}

        async def drain(fake, index):
            if len(stopped) < 3 and fake not in stopped and index == 3 + 4 * len(stopped):
                await until(lambda: len(tokens.get(0, ())) == index)
                stopped.append(fake)
                raise Unavailable("the worker is stopping")

        a.step = b.step = c.step = d.step = drain
        async with over(a, b, c, d) as pool:
            await collect(pool, spec(), tokens=tokens)
        assert tokens == {0: ids} and len(stopped) == 3
        (last,) = {a, b, c, d} - set(stopped)
        assert [len(output.output_ids) for output in last.starts[0].outputs] == [11]
    assert faults(calls=False) == {("failovers",): 3}


async def test_the_only_worker_comes_back_within_the_deadline():
    async with FakeLLM() as llm, over(llm) as pool:
        tokens = {}

        async def die(fake, index):
            if len(fake.starts) == 1 and index == 1:
                await until(lambda: tokens)
                await fake.die()

        llm.step = die
        task = asyncio.create_task(collect(pool, spec(), tokens=tokens))
        await until(lambda: llm.server is None)
        await llm.start()
        await task
        assert tokens == {0: [1, 2, 3]}
        assert list(llm.starts[1].outputs[0].output_ids) == [1]


async def test_every_choice_goes_on_elsewhere_where_it_stood():
    """Of four choices one has ended when the worker dies, and one is not wanted any more."""
    ids = list(range(100, 120))
    async with FakeLLM(ids) as a, FakeLLM(ids) as b, over(a, b) as pool:
        died, tokens = [], {}
        a.others = b.others = {1: ids[:3]}

        async def die(fake, index):
            if index == 7 and not died:
                died.append(fake)
                await until(lambda: len(tokens.get(1, ())) == 3)
                await fake.die()

        a.step = b.step = die
        made = FailoverGeneration(spec(n=4), pool, Refs(), Deadline.after(20), 20)
        async with contextlib.aclosing(made.events()) as events:
            async for event in events:
                if isinstance(event, Delta):
                    assert event.first_index == len(tokens.setdefault(event.choice, []))
                    tokens[event.choice] += event.token_ids
                    if event.choice == 3 and event.first_index == 1:
                        made.leave(3)
        assert (tokens[0], tokens[1], tokens[2]) == (ids, ids[:3], ids)
        again = (b if died == [a] else a).starts[0]
        sent = {output.choice: list(output.output_ids) for output in again.outputs}
        assert set(sent) == {0, 1, 2, 3} and sent[1] == ids[:3] and sent[3] == tokens[3]
        assert all(given == ids[: len(given)] for given in sent.values())
        assert [output.choice for output in again.outputs if output.finished] == [1, 3]
        assert len((a if died == [a] else b).starts[0].outputs) == 0


async def test_a_request_that_takes_worker_after_worker_is_given_up():
    tokens = {}

    async def die(fake, index):
        first = sum(len(output.output_ids) for output in fake.starts[-1].outputs)
        if index > first:  # After a token came through, so that it surely had the request.
            await until(lambda: len(tokens.get(0, ())) > first)
            await fake.die()

    fakes = [FakeLLM(list(range(9))) for _ in range(4)]
    async with fakes[0], fakes[1], fakes[2], fakes[3], over(*fakes) as pool:
        for fake in fakes:
            fake.step = die
        with pytest.raises(Unavailable, match="not tried again"):
            await collect(pool, spec(), tokens=tokens)
        assert sum(fake.server is None for fake in fakes) == generation.MAX_LLM_DEATHS + 1


async def test_a_lost_device_counts_as_a_lost_worker(faults):
    async with FakeLLM() as a, FakeLLM() as b, over(a, b) as pool:
        failed = []

        async def lose(fake, index):
            if not failed:
                failed.append(fake)
                raise DeviceLost("gone")

        a.step = b.step = lose
        tokens, _ = await collect(pool, spec())
        assert tokens == {0: [1, 2, 3]} and failed
    assert faults(calls=False) == {("retries", "generate", "lost"): 1}


async def test_a_full_worker_sends_the_request_to_another(faults):
    async def full(fake, index):
        raise Overloaded("full", retry_after_s=2)

    async with FakeLLM() as a, FakeLLM() as b, over(a, b) as pool:
        a.step = full
        for _ in range(2):
            tokens, _ = await collect(pool, spec())
            assert tokens == {0: [1, 2, 3]}
        b.step = full
        done = [worker.throughput.per_s for worker in pool.workers]
        with pytest.raises(Overloaded) as caught:
            await collect(pool, spec())
        assert caught.value.retry_after_s == 2
        assert done == [worker.throughput.per_s for worker in pool.workers]  # Nothing is done.
    assert faults(calls=False).keys() == {("retries", "generate", "full")}


async def test_the_workers_own_errors_are_not_tried_again():
    async def refuse(fake, index):
        raise ContextLengthExceeded("too long")

    async with FakeLLM() as a, FakeLLM() as b, over(a, b) as pool:
        a.step = b.step = refuse
        with pytest.raises(ContextLengthExceeded, match="too long"):
            await collect(pool, spec())
        assert len(a.starts) + len(b.starts) == 1


async def test_the_deadline_ends_it():
    async with FakeLLM() as llm, over(llm) as pool:
        llm.step = lambda fake, index: asyncio.Event().wait()
        with pytest.raises(DeadlineExceeded):
            await collect(pool, spec(), deadline=0.3)
        await until(lambda: llm.running == 0)


async def test_closing_aborts_the_sequence():
    async with FakeLLM() as llm, over(llm) as pool:

        async def hold(fake, index):
            if index == 1:
                await asyncio.Event().wait()

        llm.step = hold
        made = FailoverGeneration(spec(), pool, Refs(), Deadline.after(20), 20)
        async with contextlib.aclosing(made.events()) as events:
            assert (await anext(events)).token_ids == (1,)
        await until(lambda: llm.running == 0)
        assert pool.workers[0].pending == 0


async def test_cancelling_while_waiting_for_a_picture_aborts_the_sequence():
    async with FakeLLM() as llm, over(llm) as pool:
        task = asyncio.create_task(collect(pool, spec(pictures=1)))
        await llm.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: llm.running == 0)


async def test_a_finished_answer_survives_the_loss_of_its_worker(faults):
    async with FakeLLM() as llm, over(llm) as pool:

        async def written(start):
            yield llm_pb2.GenerateOut(
                deltas=[
                    llm_pb2.TokenDelta(
                        token_ids=[1, 2], finish_reason=llm_pb2.FINISH_REASON_STOP, stop_token_id=2
                    )
                ]
            )
            await until(lambda: tokens)
            await llm.die()

        llm._write = written
        tokens = {}
        _, last = await collect(pool, spec(), tokens=tokens)
        assert tokens == {0: [1, 2]}
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (12, 2)
    assert faults(calls=False) == {}


@pytest.mark.parametrize(
    "deltas",
    [
        [llm_pb2.TokenDelta(first_index=1, token_ids=[1])],
        [llm_pb2.TokenDelta(token_ids=[1, 2]), llm_pb2.TokenDelta(first_index=1, token_ids=[2])],
        [llm_pb2.TokenDelta(choice=2, token_ids=[1])],
        [
            llm_pb2.TokenDelta(token_ids=[1], finish_reason=llm_pb2.FINISH_REASON_STOP),
            llm_pb2.TokenDelta(first_index=1, token_ids=[2]),
        ],
    ],
    ids=["left out", "doubled", "no such choice", "after the end"],
)
async def test_a_worker_that_does_not_go_on_where_the_answer_stood_is_an_error(deltas):
    async with FakeLLM() as llm, over(llm) as pool:

        async def written(start):
            yield llm_pb2.GenerateOut(deltas=deltas)

        llm._write = written
        with pytest.raises(EngineFailure):
            await collect(pool, spec(n=2))


async def test_finish_reasons():
    async with FakeLLM([1, 2, 3]) as llm, over(llm) as pool:
        for limit, finish, stop in ((2, FinishReason.LENGTH, None), (3, FinishReason.STOP, 3)):
            made = FailoverGeneration(spec(max_tokens=limit), pool, Refs(), Deadline.after(20), 20)
            deltas = [event async for event in made.events() if isinstance(event, Delta)]
            assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == (finish, stop)
