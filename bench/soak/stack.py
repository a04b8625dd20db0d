"""The stack under test: Redis, two encoders, two LLM workers and two gateways, as real processes.

Workers join the registry in Redis, and gateways find them there. A killed service is started again
after a moment, as by an orchestrator: a worker at another port, a gateway at the same one. The
store's local tier is a small tmpfs of its own, if the system lets us mount one, so that it can be
filled without harm to others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2

from bench.service import Kind, Service
from bench.soak.cases import MAX_REQUEST_BYTES
from opticnerve.secret import make_secret
from tests.redis import RedisServer
from tests.system import alive, free_port, wait_for

TIER_BYTES = 4 * 2**20  # Hundreds of the demo's embeddings; the store uses half of it.
STORE_TTL_S = 20
KV_CACHE_TOKENS = 8192
REQUEST_TIMEOUT_S = 150.0
START_S = 300.0  # On a busy machine.
PAUSE_S = 0.3  # From a service's end to its next start.
MARK = "SOAK_RUN"  # In the environment of every process of a run.
FLAGS: dict[Kind, dict[str, Any]] = {
    "encoder": {"threads": 1, "dtype": "float32"},
    "llm": {"threads": 1, "dtype": "float32", "kv_cache_tokens": KV_CACHE_TOKENS},
    "gateway": {
        "max_request_bytes": MAX_REQUEST_BYTES,
        "request_timeout_s": REQUEST_TIMEOUT_S,
        "worker_wait_s": REQUEST_TIMEOUT_S,
    },
}


@dataclass
class SoakStack:
    """The running processes, and ways to harm them."""

    services: dict[str, Service]  # By name, such as ``encoder-1``.
    redis: RedisServer
    tier: Path
    mounted: bool  # Whether the tier is its own file system.
    mark: str

    @property
    def gateways(self) -> list[str]:
        """Their URLs."""
        return [each.address for each in self.services.values() if each.kind == "gateway"]

    def pids(self) -> dict[str, int]:
        """The ids of running processes by name, including ``redis``."""
        found = {name: service.pid for name, service in self.services.items()}
        return {name: pid for name, pid in {**found, "redis": self.redis.pid}.items() if pid}

    def replace(self, *names: str) -> None:
        """Kills services with SIGKILL and starts them again. Returns when they listen."""
        for name in names:
            self.services[name].kill()
        time.sleep(PAUSE_S)
        for name in names:
            self.services[name].start()
        for name in names:
            self.services[name].listening()

    def is_whole(self) -> bool:
        """Whether both gateways can use every worker."""
        workers = {each.address for each in self.services.values() if each.kind != "gateway"}
        return all(workers <= _serving(url) for url in self.gateways)

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


def _serving(url: str) -> set[str]:
    """Addresses of the workers that a gateway can use."""
    try:
        health = httpx2.get(f"{url}/health", trust_env=False, timeout=5.0).json()
    except httpx2.HTTPError:
        return set()
    workers = [*health["encoders"]["workers"], *health["llms"]["workers"]]
    return {worker["address"] for worker in workers if worker["state"] == "serving"}


@contextlib.contextmanager
def open_stack(logs: Path) -> Iterator[SoakStack]:
    """Starts everything, and stops it at the end. ``logs``: a directory for what services log."""
    mark = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        tier, mounted = stack.enter_context(_small_tmpfs(directory / "tier"))
        environment = {MARK: mark, "TMPDIR": str(directory)}
        stack.enter_context(mock.patch.dict(os.environ, environment))
        redis = stack.enter_context(RedisServer("--maxmemory", "64mb"))
        shared = {
            "store": f"{redis.url}?local=shm://{tier}/store",
            "store_ttl_s": STORE_TTL_S,
            "store_key_file": str(make_secret(directory, "store-key")),
            "rpc_token_file": str(make_secret(directory, "token")),
        }
        services = {each.name: each for each in _services(logs, shared)}
        for service in services.values():
            stack.callback(service.stop)
            service.start()
        for service in services.values():
            service.listening()
        running = SoakStack(services, redis, tier, mounted, mark)
        wait_for("the stack", running.is_whole, START_S)
        yield running


def _services(logs: Path, shared: dict[str, Any]) -> Iterator[Service]:
    kinds: Sequence[Kind] = ("encoder", "llm", "gateway")
    for kind in kinds:
        for number in (1, 2):
            flags = {**FLAGS[kind], **shared}
            if kind == "gateway":
                flags["port"] = free_port()
            yield Service(kind, f"{kind}-{number}", logs, **flags)


@contextlib.contextmanager
def _small_tmpfs(path: Path) -> Iterator[tuple[Path, bool]]:
    """(directory, whether it is its own file system)"""
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
    """Keeps the file system of ``directory`` full: takes whatever becomes free."""
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
    """Command lines of a run's living processes, by process id."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (directory / "environ").read_bytes().split(b"\0"):
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if alive(int(directory.name)):
                    found[int(directory.name)] = line
    return found
