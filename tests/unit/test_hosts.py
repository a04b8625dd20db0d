"""Names to addresses: names that do not answer stop no others, and no process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.edge.limits import MAX_NEW_LOOKUPS, MAX_NEW_LOOKUPS_PER_SITE, SILENT_NAME_S
from gateway.media import hosts
from gateway.media.fetch import MediaFetcher
from gateway.media.hosts import Resolver, site
from opticnerve.config import GatewayConfig
from opticnerve.errors import MediaFetchFailed

SAFETY_S = 60  # Of a test that would hang.


class Names:
    """``getaddrinfo`` of a world in which names with ``silent`` in them do not answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.hanging = 0
        self.end = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, host: str, port: int, **kinds: Any) -> list[Any]:
        with self._lock:
            self.asked.append(host)
            self.hanging += "silent" in host
        if "silent" in host:
            self.end.wait(SAFETY_S)
            raise socket.gaierror("no answer")
        if "nowhere" in host:
            raise socket.gaierror("no such name")
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (address, port)) for address in ("1.2.3.4", "1.2.3.4", "::5")]


def run(work: Callable[[Resolver, Names], Awaitable[None]]) -> None:
    names = Names()

    async def main() -> None:
        async with asyncio.timeout(SAFETY_S):
            await work(Resolver(names), names)

    try:
        asyncio.run(main())
    finally:
        names.end.set()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "NAME_TIMEOUT_S", 0.2)


def test_the_systems_resolver_is_asked() -> None:
    assert "127.0.0.1" in asyncio.run(Resolver()("localhost", 80))


def test_a_name_has_its_addresses_once_and_in_order() -> None:
    async def work(resolve: Resolver, names: Names) -> None:
        assert await resolve("Pictures.Example", 80) == ["1.2.3.4", "::5"]
        with pytest.raises(OSError, match="no such name"):
            await resolve("nowhere.example", 80)
        assert not resolve._running and resolve._new.held == 0

    run(work)


def test_addresses_ask_nobody() -> None:
    async def work(resolve: Resolver, names: Names) -> None:
        for address in ("127.0.0.1", "::1"):
            assert await resolve(address, 80) == [address]
        assert not names.asked

    run(work)


@pytest.mark.parametrize("host", ["{}.silent.example", "x.silent{}.example"])
def test_names_that_do_not_answer_stop_no_others(host: str) -> None:
    """200 of one site, and 32 of as many sites."""
    many = 200 if host.startswith("{}") else 32

    async def work(resolve: Resolver, names: Names) -> None:
        lost = [asyncio.create_task(resolve(host.format(i), 80)) for i in range(many)]
        while names.hanging < min(many, MAX_NEW_LOOKUPS_PER_SITE):
            await asyncio.sleep(0.01)
        for i in range(50):
            assert await resolve(f"new{i}.quick.example", 80)
        assert not any(task.done() for task in lost)
        assert names.hanging <= (MAX_NEW_LOOKUPS_PER_SITE if many == 200 else many)
        for task in lost:
            task.cancel()
        await asyncio.gather(*lost, return_exceptions=True)
        assert len(resolve._running) == names.hanging  # Threads that cannot be stopped count on.
        names.end.set()
        while resolve._running:
            await asyncio.sleep(0.01)
        assert resolve._new.held == 0

    run(work)


def test_names_that_were_resolved_need_no_slot_of_new_ones() -> None:
    async def work(resolve: Resolver, names: Names) -> None:
        await resolve("known.example", 80)
        sites = [f"x.silent{i}.org" for i in range(MAX_NEW_LOOKUPS + 10)]
        lost = [asyncio.create_task(resolve(name, 80)) for name in sites]
        while resolve._new.held < MAX_NEW_LOOKUPS:
            await asyncio.sleep(0.01)
        assert await resolve("known.example", 80)
        for task in lost:
            task.cancel()
        await asyncio.gather(*lost, return_exceptions=True)

    run(work)


@pytest.mark.usefixtures("impatient")
def test_a_silent_name_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(resolve: Resolver, names: Names) -> None:
        with pytest.raises(TimeoutError):
            await resolve("silent.example", 80)
        names.end.set()
        while resolve._running:
            await asyncio.sleep(0.01)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await resolve("Silent.Example.", 80)
        assert names.asked == ["silent.example"]
        now = hosts.time.monotonic()
        monkeypatch.setattr(hosts.time, "monotonic", lambda: now + SILENT_NAME_S)
        with pytest.raises(OSError, match="no answer"):
            await resolve("silent.example", 80)
        assert len(names.asked) == 2

    run(work)


@pytest.mark.usefixtures("impatient")
def test_one_thread_asks_for_all_who_want_a_name() -> None:
    async def work(resolve: Resolver, names: Names) -> None:
        asked = [resolve("silent.example", 80) for _ in range(20)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(each, TimeoutError) for each in found)
        assert names.asked == ["silent.example"]

    run(work)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "MAX_REMEMBERED", 10)

    async def work(resolve: Resolver, names: Names) -> None:
        for i in range(20):
            await resolve(f"a{i}.example", 80)
        assert len(resolve._resolved) == 10

    run(work)


@pytest.mark.usefixtures("impatient")
def test_a_fetch_says_that_the_name_did_not_answer() -> None:
    async def work(resolve: Resolver, names: Names) -> None:
        fetch = MediaFetcher(GatewayConfig(), resolve=resolve)
        with pytest.raises(MediaFetchFailed, match="no answer for the host's name"):
            await fetch.fetch("http://silent.example/x")

    run(work)


def test_a_thread_that_hangs_keeps_no_loop_and_no_process() -> None:
    names = Names()

    async def main() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await Resolver(names)("silent.example", 80)

    asyncio.run(main())
    asked = [thread for thread in threading.enumerate() if thread.name == "resolve"]
    assert asked and all(thread.daemon for thread in asked)
    names.end.set()
    for thread in asked:
        thread.join(SAFETY_S)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("a.b.example.com", "example.com"),
        ("example.com", "example.com"),
        ("a.b.example.co.uk", "example.co.uk"),
        ("co.uk", "co.uk"),
        ("a.abc.com", "abc.com"),
        ("localhost", "localhost"),
        ("a.b.bbc.uk", "bbc.uk"),
    ],
)
def test_who_owns_a_name(name: str, owner: str) -> None:
    assert site(name) == owner
