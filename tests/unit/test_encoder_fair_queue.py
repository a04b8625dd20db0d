"""Turns: places shared between requests by what their pictures take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder_service.fair_queue import FairQueue


class Line:
    """Items that pass through turns and stay until they are let go."""

    def __init__(self, places: int) -> None:
        self.turns = FairQueue(places)
        self.order: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, sharer: str, cost: int) -> None:
        self._leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._pass(name, sharer, cost))
        await settle()

    async def _pass(self, name: str, sharer: str, cost: int) -> None:
        async with self.turns.hold(1, sharer, cost):
            self.order.append(name)
            await self._leave[name].wait()

    async def go(self, name: str) -> None:
        self._leave[name].set()
        await settle()

    async def drain(self) -> list[str]:
        """Lets everybody go, in the order in which they came in; what that order was."""
        for _ in self.tasks:
            for name in list(self.order):
                await self.go(name)
        return self.order


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_a_small_item_passes_the_large_ones_of_another() -> None:
    async def scenario() -> None:
        line = Line(1)
        for number in range(5):
            await line.come(f"large {number}", "attacker", 1_000_000)
        await line.come("small", "victim", 10)
        assert await line.drain() == ["large 0", "small", *(f"large {n}" for n in range(1, 5))]

    play(scenario)


def test_owners_share_and_an_owner_keeps_its_order() -> None:
    async def scenario() -> None:
        line = Line(1)
        await line.come("first", "z", 10)
        for number in range(3):
            await line.come(f"a{number}", "a", 10)
        for number in range(3):
            await line.come(f"b{number}", "b", 10)
        assert await line.drain() == ["first", "a0", "b0", "a1", "b1", "a2", "b2"]

    play(scenario)


def test_a_large_item_is_not_passed_for_ever() -> None:
    """A hundred small ones that keep coming are as much as it is."""

    async def scenario() -> None:
        line = Line(1)
        await line.come("s0", "small", 10)
        await line.come("large", "large", 1000)
        for number in range(1, 300):
            await line.come(f"s{number}", f"small {number}", 10)
            await line.go(f"s{number - 1}")
            if "large" in line.order:
                break
        assert 90 < line.order.index("large") < 110
        await line.drain()

    play(scenario)


def test_who_leaves_gives_its_place_to_the_next_and_is_forgotten() -> None:
    async def scenario() -> None:
        line = Line(1)
        for name in "abc":
            await line.come(name, name, 10)
        line.tasks["b"].cancel()  # While it waits.
        await settle()
        assert line.turns.waiting == 1
        line.tasks["a"].cancel()  # While it has the place.
        await settle()
        assert line.order == ["a", "c"]
        await line.drain()
        assert line.turns.held == 0 and line.turns.waiting == 0
        assert not line.turns._due and not line.turns._queue

    play(scenario)


def test_a_turn_that_came_with_the_cancellation_is_given_back() -> None:
    async def scenario() -> None:
        line = Line(1)
        await line.come("a", "a", 10)
        await line.come("b", "b", 10)
        line._leave["a"].set()
        await asyncio.sleep(0)  # The holder leaves: it is b's turn now.
        line.tasks["b"].cancel()
        await settle()
        assert line.order == ["a"] and line.turns.held == 0
        await line.come("c", "c", 10)
        assert line.order == ["a", "c"]
        await line.drain()

    play(scenario)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.booleans()),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_everybody_gets_a_turn_and_no_place_is_lost(
    items: Sequence[tuple[str, int, bool]], places: int
) -> None:
    async def scenario() -> None:
        line = Line(places)
        for number, (sharer, cost, leaves) in enumerate(items):
            await line.come(str(number), sharer, cost)
            assert len(line.order) <= places
            if leaves and str(number) not in line.order:
                line.tasks.pop(str(number)).cancel()
                await settle()
        stay = set(line.tasks)
        await asyncio.wait_for(line.drain(), 60)
        assert set(line.order) == stay
        assert line.turns.held == 0 and not line.turns._due and not line.turns._queue

    play(scenario)


@pytest.mark.parametrize("places", [1, 2])
def test_never_more_than_there_are_places(places: int) -> None:
    async def scenario() -> None:
        line = Line(places)
        for number in range(4):
            await line.come(str(number), "one", 1)
        assert len(line.order) == places
        await line.drain()

    play(scenario)
