"""What a request does about rows that are missing: tries, asks, waits, gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import pytest

from llm_service.wire.row_resolver import MAX_REPEATS, AskCaller, NeededRows
from opticnerve.embeddings.ref import EmbeddingRef, Location, TensorSpec
from opticnerve.errors import (
    EmbeddingCorrupt,
    EmbeddingEvicted,
    EmbeddingNotFound,
    InvalidMedia,
    InvalidRequest,
)

KEY = "a" * 64


def ref(tag: str = "", rows: int = 4) -> EmbeddingRef:
    spec = TensorSpec("rows", "F32", (rows, 8))
    return EmbeddingRef(KEY, "f", (spec,), rows, Location(fetch_address=tag))


@dataclass
class World:
    """Engine, source and caller of one request, and what they were told."""

    rows: NeededRows = field(init=False)
    ready: list[str] = field(default_factory=list)
    found: list[set[str]] = field(default_factory=list)
    failed: list[Exception] = field(default_factory=list)
    needed: list[AskCaller] = field(default_factory=list)
    tried: list[EmbeddingRef] = field(default_factory=list)
    here: set[str] = field(default_factory=set)
    outcome: Callable[[EmbeddingRef], Awaitable[None]] | None = None

    def rows_ready(self, key: str) -> None:
        self.ready.append(key)

    def rows_available(self, request_id: str, keys: Iterable[str]) -> None:
        self.found.append(set(keys))

    def rows_failed(self, request_id: str, key: str, error: Exception) -> None:
        self.failed.append(error)

    async def find(self, key: str) -> bool:
        return key in self.here

    async def present(self, keys: Iterable[str]) -> set[str]:
        return self.here & set(keys)

    async def ensure(self, given: EmbeddingRef) -> None:
        self.tried.append(given)
        if self.outcome is not None:
            await self.outcome(given)


def world(first: EmbeddingRef | None, wait_s: float = 30.0, min_rows: int = 4) -> World:
    made = World()
    made.rows = NeededRows(
        "r", {KEY: first}, {KEY: min_rows}, wait_s, made, made, made.needed.append
    )
    return made


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_rows_that_are_on_this_host_need_no_reference() -> None:
    async def body() -> None:
        made = world(None)
        made.here.add(KEY)
        await settle()
        assert made.found == [{KEY}] and made.ready == []
        made.rows.wanted([KEY], False)
        await settle()
        assert made.ready == [KEY] and made.needed == []

    asyncio.run(body())


def test_a_reference_that_comes_before_it_is_wanted_is_reported() -> None:
    async def body() -> None:
        made = world(None)
        await settle()
        made.rows.ready(ref())
        assert made.found == [{KEY}] and made.tried == []

    asyncio.run(body())


def test_rows_that_arrive_are_available_should_their_sequence_be_preempted() -> None:
    """Else a preempted sequence counts as waiting for an encoder, although its rows are here."""

    async def body() -> None:
        made = world(None)
        made.rows.wanted([KEY], False)
        await settle()
        made.rows.ready(ref())
        await settle()
        assert made.ready == [KEY] and made.found == [{KEY}]

    asyncio.run(body())


def raising(error: Exception) -> Callable[[EmbeddingRef], Awaitable[None]]:
    async def fail(given: EmbeddingRef) -> None:
        raise error

    return fail


def test_nothing_happens_before_the_engine_asks() -> None:
    async def body() -> None:
        made = world(ref())
        await settle()
        assert made.tried == []
        made.rows.wanted([KEY], False)
        await settle()
        assert made.ready == [KEY]
        assert made.needed == []

    asyncio.run(body())


def test_a_reference_that_comes_first_is_used_when_asked() -> None:
    async def body() -> None:
        made = world(None)
        made.rows.ready(ref())
        made.rows.wanted([KEY], False)
        await settle()
        assert made.ready == [KEY]

    asyncio.run(body())


@pytest.mark.parametrize(
    ("error", "preempted", "reason"),
    [
        (EmbeddingNotFound("x"), False, "NOT_FOUND"),
        (EmbeddingEvicted("x"), False, "EVICTED"),
        (EmbeddingEvicted("x"), True, "PREEMPTED"),
        (EmbeddingCorrupt("x"), True, "CORRUPT"),
        (ValueError("a bug"), False, "NOT_FOUND"),
    ],
)
def test_the_caller_is_told_why(error: Exception, preempted: bool, reason: str) -> None:
    async def body() -> None:
        made = world(ref())
        made.outcome = raising(error)
        made.rows.wanted([KEY], preempted)
        await settle()
        assert [(needed.keys, needed.reason) for needed in made.needed] == [((KEY,), reason)]
        made.outcome = None
        made.rows.ready(ref("again"))
        await settle()
        assert made.ready == [KEY]
        made.rows.close()

    asyncio.run(body())


def test_the_third_failure_ends_it() -> None:
    async def body() -> None:
        made = world(ref())
        error = EmbeddingCorrupt("x")
        made.outcome = raising(error)
        made.rows.wanted([KEY], False)
        for _ in range(2):
            await settle()
            assert made.failed == []
            made.rows.ready(ref())
        await settle()
        assert made.failed == [error]
        assert len(made.needed) == 2
        made.rows.close()

    asyncio.run(body())


def test_rows_of_the_caller_that_are_no_good_fail_the_request_at_once() -> None:
    async def body() -> None:
        made = world(ref())
        error = InvalidRequest("x", param="ref")
        made.outcome = raising(error)
        made.rows.wanted([KEY], False)
        await settle()
        assert made.failed == [error] and made.needed == []
        made.rows.close()

    asyncio.run(body())


def test_a_newer_reference_is_tried_before_the_caller_is_asked() -> None:
    async def body() -> None:
        made = world(ref("old"))

        async def slow(given: EmbeddingRef) -> None:
            await asyncio.sleep(0)
            if given.location.fetch_address == "old":
                made.rows.ready(ref("new"))
                raise EmbeddingNotFound("x")

        made.outcome = slow
        made.rows.wanted([KEY], False)
        await settle()
        await settle()
        assert made.ready == [KEY]
        assert made.needed == []
        assert [given.location.fetch_address for given in made.tried] == ["old", "new"]

    asyncio.run(body())


def test_the_deadline() -> None:
    async def body() -> None:
        made = world(None, wait_s=0.01)
        made.rows.wanted([KEY], False)
        async with asyncio.timeout(60):
            while not made.failed:
                await asyncio.sleep(0.002)
        assert isinstance(made.failed[0], EmbeddingNotFound)
        in_time = world(None)
        in_time.rows.wanted([KEY], False)
        timer = in_time.rows._items[KEY].timer
        in_time.rows.ready(ref())
        await settle()
        assert in_time.ready == [KEY]
        assert timer is not None and timer.cancelled()

    asyncio.run(body())


def test_rows_that_never_stay_do_not_go_round_for_ever() -> None:
    async def body() -> None:
        made = world(ref())
        for _ in range(MAX_REPEATS + 1):
            made.rows.wanted([KEY], False)
            await settle()
        assert len(made.ready) == MAX_REPEATS
        assert isinstance(made.failed[0], EmbeddingNotFound)
        preempted = world(ref())
        for _ in range(3 * MAX_REPEATS):
            preempted.rows.wanted([KEY], True)
            await settle()
        assert preempted.failed == []

    asyncio.run(body())


def test_what_the_caller_may_not_send() -> None:
    async def body() -> None:
        made = world(ref())
        with pytest.raises(InvalidRequest, match="rows"):
            made.rows.ready(ref(rows=3))
        with pytest.raises(InvalidRequest, match="not an item"):
            made.rows.failed("b" * 64, InvalidMedia("x"))
        with pytest.raises(InvalidRequest, match="rows"):
            world(ref(rows=3))
        error = InvalidMedia("not a picture")
        made.rows.failed(KEY, error)
        assert made.failed == [error]

    asyncio.run(body())
