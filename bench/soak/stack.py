"""The stack under test: Redis, two encoders, two LLM workers and two gateways, as real processes.

``opticnerve up`` runs the workers and the first gateway, and starts again what ends; the second
gateway and Redis are started again here. The local tier of the store is a small tmpfs of its own,
where the system lets us mount one: it can be filled without harm to anyone else.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from unittest import mock

import httpx2

import opticnerve
from bench.soak.cases import MAX_REQUEST_BYTES
from opticnerve.config import GatewayConfig
from opticnerve.config.options import options, to_command_line
from opticnerve.local.serve import Stack
from opticnerve.secret import make_secret
from tests.e2e.faults import pid_at, processes
from tests.redis import RedisServer
from tests.system import alive, free_port, wait_for

TIER_BYTES = 4 * 2**20  # Hundreds of the demo's embeddings; the store uses half of it.
STORE_TTL_S = 20
KV_CACHE_TOKENS = 8192
REQUEST_TIMEOUT_S = 150.0
MARK = "SOAK_RUN"  # In the environment of every process of a run.
MODULES = {"encoder": "encoder_service", "llm": "llm_service", "gateway": "gateway"}
SETTINGS: dict[str, Any] = {
    "max_request_bytes": MAX_REQUEST_BYTES,
    "request_timeout_s": REQUEST_TIMEOUT_S,
    "worker_wait_s": REQUEST_TIMEOUT_S,
}


class SecondGateway:
    """A gateway beside that of ``up``, at a port that it keeps when it is started again."""

    def __init__(self, up: Stack, token_file: str, log: IO[str]) -> None:
        health = up._http.get("/health").json()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        given = {
            **SETTINGS,
            "port": self.port,
            "encoder_addresses": [worker["address"] for worker in health["encoders"]["workers"]],
            "llm_addresses": [worker["address"] for worker in health["llms"]["workers"]],
            "rpc_token_file": token_file,
            "parent_pid": os.getpid(),
        }
        arguments, _ = to_command_line(options(GatewayConfig), given)
        self._command = [sys.executable, "-m", "gateway", *arguments]
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Returns when it is ready."""
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=self._log, text=True, start_new_session=True
        )
        wait_for("the second gateway", lambda: is_ready(self.url))

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)


@dataclass
class SoakStack:
    """What runs. ``gateways``: their URLs; the second one is not of ``up``."""

    up: Stack
    second: SecondGateway
    redis: RedisServer
    tier: Path
    mounted: bool  # The tier is a file system of its own.
    mark: str

    def __post_init__(self) -> None:
        self.gateways = (self.up.url, self.second.url)
        health = self.up._http.get("/health").json()
        self._names = {}  # Of workers, by their ports.
        self._known: dict[int, str] = {}  # Names by process id.
        for service in ("encoder", "llm"):
            for index, worker in enumerate(health[f"{service}s"]["workers"], 1):
                self._names[worker["address"].rpartition(":")[2]] = f"{service}-{index}"
                pid = pid_at(self.up, MODULES[service], worker["address"])
                self._known[pid] = f"{service}-{index}"

    def services(self) -> dict[str, int]:
        """Process ids of what runs, by name, such as ``encoder-1`` or ``redis``."""
        found = {"gateway-2": self.second.pid, "redis": self.redis.pid}
        for pid, line in processes(self.up.process.pid).items():
            words = line.split()
            if pid not in self._known and "-m" in words and "--port" in words:
                port = words[words.index("--port") + 1]
                known = "gateway-1" if "gateway" in words else self._names.get(port)
                if known is not None:
                    self._known[pid] = known
            if pid in self._known:
                found[self._known[pid]] = pid
        return {name: pid for name, pid in found.items() if pid and alive(pid)}

    def kill(self, *names: str) -> None:
        """SIGKILL to services and everything that they started."""
        services = self.services()
        for name in names:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(services[name], signal.SIGKILL)

    def is_whole(self) -> bool:
        """Whether both gateways know two encoders and two LLM workers that serve."""
        return all(is_ready(url) and _serving(url) == [2, 2] for url in self.gateways)

    def is_idle(self) -> bool:
        """Whether no request is under way, and every KV block is free."""
        for url in self.gateways:
            health = httpx2.get(f"{url}/health", trust_env=False).json()
            busy = health["gateway"]["requests_in_flight"]
            for worker in health["llms"]["workers"]:
                load, limits = worker["load"], worker["limits"]
                busy += load["running"] + load["waiting"]
                busy += limits["num_kv_blocks"] - load["free_kv_blocks"]
            if busy:
                return False
        return True


def is_ready(url: str) -> bool:
    try:
        answer = httpx2.get(f"{url}/ready?pictures=true", trust_env=False, timeout=5.0)
    except httpx2.HTTPError:
        return False
    return answer.status_code == 200


def _serving(url: str) -> list[int]:
    try:
        health = httpx2.get(f"{url}/health", trust_env=False, timeout=5.0).json()
    except httpx2.HTTPError:
        return []
    return [health[pool]["serving"] for pool in ("encoders", "llms")]


@contextlib.contextmanager
def open_stack(log: IO[str]) -> Iterator[SoakStack]:
    """Starts everything, and stops it at the end. ``log``: for what the second gateway says."""
    mark = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        tier, mounted = stack.enter_context(_small_tmpfs(directory / "tier"))
        (directory / "tmp").mkdir()
        environment = {MARK: mark, "TMPDIR": str(directory / "tmp")}
        stack.enter_context(mock.patch.dict(os.environ, environment))
        redis = stack.enter_context(RedisServer("--maxmemory", "64mb"))
        token_file = str(make_secret(directory, "token"))
        up = stack.enter_context(
            opticnerve.serve(
                encoders=2,
                llms=2,
                threads=1,
                dtype="float32",
                store=f"{redis.url}?local=shm://{tier}/store",
                store_ttl_s=STORE_TTL_S,
                kv_cache_tokens=KV_CACHE_TOKENS,
                rpc_token_file=token_file,
                max_restarts=10**6,
                **SETTINGS,
            )
        )
        second = SecondGateway(up, token_file, log)
        stack.callback(second.close)
        yield SoakStack(up, second, redis, tier, mounted, mark)


@contextlib.contextmanager
def _small_tmpfs(path: Path) -> Iterator[tuple[Path, bool]]:
    """(directory, whether it is a file system of its own)"""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TIER_BYTES}", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield path, mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


@contextlib.contextmanager
def filled(directory: Path) -> Iterator[None]:
    """Keeps the file system of ``directory`` full: whatever becomes free is taken again."""
    path, ended = directory / "filler", threading.Event()

    def fill() -> None:
        with open(path, "ab", buffering=0) as file:
            while not ended.is_set():
                for size in (2**16, 2**12):
                    with contextlib.suppress(OSError):
                        while file.write(b"\1" * size) == size:
                            pass
                ended.wait(0.01)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink()


def marked(mark: str) -> dict[int, str]:
    """Command lines of the processes that live and belong to a run, by process id."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (directory / "environ").read_bytes().split(b"\0"):
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if alive(int(directory.name)):
                    found[int(directory.name)] = line
    return found
