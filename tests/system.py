"""What tests ask of the system: which processes live, which ports are free."""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

WAIT_S = 120.0
PORTS_FROM = 10_000
_random = random.SystemRandom()
_given: set[int] = set()  # Ports that ``free_port`` has returned in this process.


def alive(pid: int) -> bool:
    """Whether a process runs. A zombie has ended: nobody may be there to reap an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(what: str, condition: Callable[[], T], timeout_s: float = WAIT_S) -> T:
    """The first true value of a condition that nothing announces."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"gave up waiting for {what}"
        time.sleep(0.02)
    return value


def free_port() -> int:
    """A port that is free and stays so: the system gives it to nobody who asks for any port, nor
    to an outgoing connection. No port is returned twice in a process. Another process that calls
    this function may still be the first to take it, so a server's first start tries again with
    another port."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(PORTS_FROM, first) if first > PORTS_FROM + 1000 else range(PORTS_FROM, 65536)
    while True:
        port = _random.choice(ports)
        if port in _given:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
        _given.add(port)
        return port
