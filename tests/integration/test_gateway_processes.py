"""``opticnerve gateway --workers N``: several real processes on one port, behind them scripted
workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.processes import share
from opticnerve.config import GatewayConfig
from opticnerve.errors import ConfigError
from opticnerve.secret import make_secret
from tests.e2e.processes import processes
from tests.fakes import FakeLLM, until
from tests.gateways import END, PAIR_ID, body, ids
from tests.system import alive

WAIT_S = 200.0
KEY = {"authorization": "Bearer sk-1"}


class Processes:
    """A gateway of two processes, and the worker that both use."""

    def __init__(self, llm: FakeLLM, parent: asyncio.subprocess.Process, url: str) -> None:
        self.llm = llm
        self.parent = parent
        self.url = url
        self.lines: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.parent.stderr is not None
        while line := await self.parent.stderr.readline():
            self.lines.append(line.decode())

    def pids(self) -> list[int]:
        return sorted(processes(self.parent.pid))

    @contextlib.contextmanager
    def only(self, pid: int) -> Iterator[None]:
        """Meanwhile new connections go to this process."""
        others = [other for other in self.pids() if other != pid]
        for other in others:
            os.kill(other, signal.SIGSTOP)
        try:
            yield
        finally:
            for other in others:
                os.kill(other, signal.SIGCONT)

    async def get(self, path: str) -> httpx2.Response:
        async with client(self.url) as http:
            return await http.get(path)

    async def ask(self, pid: int, key: str = "sk-1") -> asyncio.Task[httpx2.Response]:
        """A chat that this process has begun to answer."""
        begun = len(self.llm.starts)
        with self.only(pid):
            asked = asyncio.create_task(chat(self.url, key))
            await until(lambda: len(self.llm.starts) > begun, WAIT_S)
        return asked

    async def requests(self) -> int:
        """Requests of /v1/models that all processes together have counted."""
        found = re.search(
            r'^opticnerve_requests_total{route="/v1/models",status="200"} (\d+)',
            (await self.get("/metrics")).text,
            re.MULTILINE,
        )
        return int(found[1]) if found else 0

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)


def client(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, headers=KEY, timeout=WAIT_S, trust_env=False)


async def chat(url: str, key: str = "sk-1") -> httpx2.Response:
    async with client(url) as http:
        headers = {"authorization": f"Bearer {key}"}
        return await http.post("/v1/chat/completions", json=body(), headers=headers)


@contextlib.asynccontextmanager
async def started(tmp_path: Path) -> AsyncIterator[Processes]:
    (tmp_path / "keys").write_text("ada: sk-1\nbob: sk-2 rate=2/h\neve: sk-3 concurrency=2\n")
    (tmp_path / "tmp").mkdir()
    token = make_secret(tmp_path, "token")
    token.chmod(0o604)  # Others may open it.
    flags = ["--workers", "2", "--host", "127.0.0.1", "--port", "0", "--drain-timeout-s", "60"]
    flags += ["--rpc-token-file", str(token)]
    async with FakeLLM([*ids("Hello there."), END], PAIR_ID) as llm:
        parent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "opticnerve", "gateway", *flags),
            *("--llm-addresses", llm.address, "--api-key-file", str(tmp_path / "keys")),
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert parent.stdout is not None
        try:
            async with asyncio.timeout(WAIT_S):
                line = (await parent.stdout.readline()).decode()
                assert line.startswith("listening http://127.0.0.1:"), await parent.communicate()
                assert (await parent.stdout.readline()).strip() == b"ready"
            yield Processes(llm, parent, line.split()[1])
        finally:
            if parent.returncode is None:
                parent.kill()
            await parent.wait()


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_serve_one_port_and_one_may_be_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with started(tmp_path) as s:
            first, second = s.pids()
            await both_serve_and_count_together(s)
            await both_count_a_rate(s)
            await both_count_what_is_in_flight(s)
            await both_read_the_keys_again(s)
            await one_is_killed_and_comes_back(s, first, second)
            await both_drain(s, tmp_path)
            assert s.count("chmod o-rwx") == 1, s.lines

    asyncio.run(scenario())


async def both_serve_and_count_together(s: Processes) -> None:
    for pid in s.pids():
        with s.only(pid):
            told = (await s.get("/health")).json()["gateway"]
            assert (told["process"], told["processes"]) == (pid, 2)
            for _ in range(3):
                assert (await s.get("/v1/models")).status_code == 200
    for pid in s.pids():
        with s.only(pid):
            assert await s.requests() == 6


async def both_count_a_rate(s: Processes) -> None:
    statuses = []
    for pid in [*s.pids(), *s.pids()]:
        with s.only(pid):
            statuses.append((await chat(s.url, "sk-2")).status_code)
    assert statuses == [200, 200, 429, 429]


async def both_count_what_is_in_flight(s: Processes) -> None:
    go, (first, second) = asyncio.Event(), s.pids()
    s.llm.step = lambda fake, index: go.wait()
    running = [await s.ask(first, "sk-3") for _ in range(2)]
    for pid in (first, second):
        with s.only(pid):
            assert (await chat(s.url, "sk-3")).status_code == 429
    go.set()
    assert [(await answer).status_code for answer in running] == [200, 200]
    with s.only(second):
        assert (await chat(s.url, "sk-3")).status_code == 200


async def both_read_the_keys_again(s: Processes) -> None:
    s.parent.send_signal(signal.SIGHUP)
    await until(lambda: s.count("keys") >= 2, WAIT_S)
    assert all(s.count(f"gateway-{index} ") for index in range(2))


async def one_is_killed_and_comes_back(s: Processes, lost: int, other: int) -> None:
    go = asyncio.Event()
    s.llm.step = lambda fake, index: go.wait()
    its_request, the_others = await s.ask(lost), await s.ask(other)
    os.kill(lost, signal.SIGKILL)
    with pytest.raises(httpx2.TransportError):
        await its_request
    go.set()
    assert (await the_others).status_code == 200
    await until(lambda: s.count("is back") == 1, WAIT_S)
    (new,) = set(s.pids()) - {other}
    assert new != lost
    with s.only(new):
        assert (await s.get("/health")).json()["gateway"]["process"] == new
        assert await s.requests() == 6, "what the lost process had counted is gone"


async def both_drain(s: Processes, directory: Path) -> None:
    """Requests end, new ones are refused, and nothing is left."""
    go = asyncio.Event()
    s.llm.step = lambda fake, index: go.wait()
    pids = s.pids()
    running = [await s.ask(pid) for pid in pids]
    s.parent.send_signal(signal.SIGTERM)
    await until(lambda: not listens(s.url), WAIT_S)
    go.set()
    assert [(await answer).status_code for answer in running] == [200, 200]
    assert await asyncio.wait_for(s.parent.wait(), WAIT_S) == 0
    assert not any(alive(pid) for pid in pids)
    assert not list((directory / "tmp").iterdir())


def listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) == 0


def test_processes_share_the_bounds() -> None:
    given = GatewayConfig(workers=4, max_connections=10, max_requests_per_key=2)
    each = share(given)
    assert (each.max_connections, each.max_concurrent_requests) == (2, 128)
    assert each.max_bytes_in_flight == given.max_bytes_in_flight // 4
    assert (each.max_requests_per_key, each.max_connections_per_address) == (1, 0)
    assert share(GatewayConfig()) == GatewayConfig()


def test_a_share_that_holds_no_whole_request_is_refused() -> None:
    settings: dict[str, Any] = {"max_bytes_in_flight": 2**20, "max_request_bytes": 2**20}
    share(GatewayConfig(workers=1, **settings))
    with pytest.raises(ConfigError, match=r"--workers 2 leaves each process 524288 bytes"):
        share(GatewayConfig(workers=2, **settings))
