"""Conversations stay with the LLM worker that has their prefix, while it is there and not busy."""

import contextlib

import pytest
from prometheus_client import REGISTRY

from gateway.clock import Deadline
from gateway.workers import generate as generation
from gateway.workers.affinity import PromptChain
from gateway.workers.dispatch import LeaseRequest
from gateway.workers.generate import FailoverGeneration, GenerateSpec
from gateway.workers.pool import WorkerPool
from opticnerve.generation.values import Done, Sampling
from opticnerve.media.plan import Grid, Modality, Span
from tests.fakes import PAIR_ID, FakeLLM, until
from tests.integration.test_gateway_generation import Refs

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]


class Conversation:
    """A conversation about one picture, told to a gateway again and again, with more each time."""

    def __init__(self, pool, number):
        self.pool = pool
        self.key = f"{number:064x}"
        self.tokens = [*range(20), *[7] * 64]

    async def turn(self, **sampling):
        self.tokens += range(len(self.tokens), len(self.tokens) + 40)
        spec = GenerateSpec(
            "r",
            tuple(self.tokens),
            (Span(20, 64, 0, 0, Modality.IMAGE, Grid(1, 16, 16)),),
            (self.key,),
            Sampling(max_tokens=100, **sampling),
            PAIR_ID,
        )
        made = FailoverGeneration(spec, self.pool, Refs(known=True), Deadline.after(20), 20)
        async with contextlib.aclosing(made.events()) as events:
            assert isinstance([event async for event in events][-1], Done)


@contextlib.asynccontextmanager
async def two_workers():
    async with FakeLLM() as one, FakeLLM() as other:
        for number, fake in enumerate((one, other)):
            fake.instance_id = str(number) * 32
            await fake.set_serving(True)
        pool = WorkerPool("LLM", [one.address, other.address], generation.describe_llm)
        await pool.start()
        try:
            await until(lambda: len(pool.serving()) == 2)
            yield pool, one, other
        finally:
            await pool.close()


def asked(*fakes):
    return [len(fake.starts) for fake in fakes]


def chosen(reason):
    return REGISTRY.get_sample_value("opticnerve_llm_choices_total", {"reason": reason}) or 0.0


async def conversation_at(pool, fake):
    """A conversation whose first turn ``fake`` has had."""
    for number in range(64):
        conversation = Conversation(pool, number)
        before = len(fake.starts)
        await conversation.turn()
        if len(fake.starts) > before:
            return conversation
    raise AssertionError("no conversation went there")


async def test_a_follow_up_goes_where_its_prefix_is_and_the_reason_is_counted():
    async with two_workers() as (pool, one, other):
        conversation = await conversation_at(pool, one)
        before, reasons = asked(one, other), [chosen("prefix"), chosen("rendezvous")]
        for _ in range(3):
            await conversation.turn()
        assert asked(one, other) == [before[0] + 3, before[1]]
        assert [chosen("prefix"), chosen("rendezvous")] == [reasons[0] + 3, reasons[1]]


async def test_a_dead_worker_s_conversation_moves_and_is_remembered_where_it_went_on():
    async with two_workers() as (pool, one, other):
        conversation = await conversation_at(pool, one)

        async def die(fake, index):
            if index == 2:
                await fake.die()

        one.step = die
        before = len(other.starts)
        await conversation.turn()  # It dies within the answer, which the other one continues.
        assert len(other.starts) == before + 1
        assert list(other.starts[-1].outputs[0].output_ids) == [1, 2]
        one.step = None
        one.instance_id = "2" * 32
        await one.start()
        await until(lambda: len(pool.serving()) == 2)
        await conversation.turn()
        assert len(other.starts) == before + 2


async def test_a_busy_worker_is_passed_over():
    async with two_workers() as (pool, one, other):
        conversation = await conversation_at(pool, one)
        long = LeaseRequest(
            1,
            Deadline.after(20),
            lambda worker: worker.address == one.address,
            prompt=PromptChain.of(range(1000, 3000)),
        )
        before = asked(one, other)
        async with pool.lease(long, 20):
            await conversation.turn()
            assert asked(one, other) == [before[0], before[1] + 1]
        await conversation.turn()
        assert asked(one, other) == [before[0], before[1] + 2]
