"""Clients' connections: how many are allowed, which one is closed for a new one, and how long a
connection may wait for its client.

A connection waits for its client to send headers, to send more of a body, or to read more of an
answer; otherwise it is at work, and is never closed to make room for another. Bytes count as
progress only once they complete the headers, so a client cannot keep a connection by sending
slowly. A connection with pipelined requests counts as waiting, and never as idle.

Bodies of thousands of tiny chunks, and WebSockets with as many frames, are read at a limited rate
per holder, because each of them takes time of the event loop. A WebSocket is at work between its
messages: its application bounds how long.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from gateway.edge.limits import (
    BODY_CHUNKS_PER_S,
    FIRST_HEAD_TIMEOUT_S,
    FREE_BODY_CHUNKS,
    IPV6_NETWORK_BITS,
    NO_PROGRESS_S,
    PROGRESS_BYTES,
)
from opticnerve.errors import ConfigError

log = logging.getLogger(__name__)

CHECK_S = 1.0  # Interval between checks for progress of a body or an answer.
OTHER_FILES = 256  # Open files besides connections: libraries, logs, media being fetched.


class Wait(Enum):
    """What a connection waits for its client to do."""

    HEAD = "a request's headers"
    BODY = "more of its body"
    MESSAGE = "more of a WebSocket's message"
    READER = "to read more of an answer"
    TURN = "nothing: requests that were sent ahead wait for their turn"


def holder_of(client: tuple[str, int] | None, key_name: str | None = None) -> str:
    """The holder of a request or connection: its key, or else its address or IPv6 network."""
    if key_name is not None:
        return f"key {key_name}"
    host = client[0].partition("%")[0] if client else ""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host)
    network = ipaddress.ip_network((address, IPV6_NETWORK_BITS), strict=False)
    return str(address.ipv4_mapped or network)


class ClientConnection(ABC):
    """A client's connection, in any protocol. It calls ``owner.update`` after each event that may
    change what it waits for. ``wait``, ``since``, ``progress_before`` and ``timer`` are set by the
    owner."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, owner: Connections) -> None:
        self.owner = owner
        self.address = self.holder = ""
        self.wait: Wait | None = None
        self.since = 0.0  # On the loop's clock: when the wait began, or last made progress.
        self.progress_before = 0  # ``progress()`` at that time.
        self.timer: asyncio.TimerHandle | None = None
        self.head_timeout_s = FIRST_HEAD_TIMEOUT_S

    @abstractmethod
    def expects(self) -> Wait | None:
        """What the connection waits for; None while it is at work."""

    @abstractmethod
    def progress(self) -> int:
        """Bytes that the client has sent, or read of an answer; only differences count."""

    @abstractmethod
    def current_holder(self) -> str:
        """The holder of its last request with a key, or its address."""

    @abstractmethod
    def close(self) -> None:
        """Closes the connection; requests and answers in progress are aborted."""


@dataclass(slots=True, eq=False)
class HeldConnections:
    """The connections of one holder. Waiting ones are ordered: longest without progress first."""

    size: int = 0
    idle: dict[ClientConnection, None] = field(default_factory=dict)  # Between requests.
    stalled: dict[ClientConnection, None] = field(
        default_factory=dict
    )  # Within a request, or pipelined.
    paced_until: float = 0.0  # On the loop's clock: no chunks are read before this time.

    def waiting(self, wait: Wait) -> dict[ClientConnection, None]:
        return self.idle if wait is Wait.HEAD else self.stalled

    def find_dispensable(
        self, no_progress_since: float, *, same_holder: bool
    ) -> ClientConnection | None:
        """The connection to close for a new one; None if there is none. ``same_holder``: whether
        the new one has the same holder; if so, a connection within a request is closed only if it
        has made no progress since ``no_progress_since``."""
        idle, stalled = next(iter(self.idle), None), next(iter(self.stalled), None)
        for connection in (idle, stalled):
            if connection is not None and connection.since <= no_progress_since:
                return connection
        return idle or (None if same_holder else stalled)


class Connections:
    """All connections of one server. Over the limit, the holder with most connections loses one
    that waits for its client; if that holder made the new connection and all its others are at
    work, the new one is closed. So one holder may have all connections while no other needs any."""

    def __init__(self, most: int, most_per_address: int = 0, stall_timeout_s: float = 30.0) -> None:
        """``most_per_address``: 0: unlimited. ``stall_timeout_s``: the time in which a client must
        read ``PROGRESS_BYTES`` of an answer that is ready."""
        self.most = most
        self.most_per_address = most_per_address
        self.stall_timeout_s = stall_timeout_s
        self._all: set[ClientConnection] = set()
        self._by_holder: dict[str, HeldConnections] = {}
        self._by_address: Counter[str] = Counter()
        self._full = False
        self._full_addresses: set[str] = set()  # Those already logged.

    @property
    def holders(self) -> int:
        """How many keys and addresses have connections."""
        return len(self._by_holder)

    def add(self, connection: ClientConnection) -> None:
        self._all.add(connection)
        self._by_address[connection.address] += 1
        self._assign(connection)
        self.update(connection)
        if 0 < self.most_per_address < self._by_address[connection.address]:
            self._refuse(connection)
            return
        full = len(self._all) > self.most
        if full:
            self._close_for(connection)
        if full and not self._full:
            log.warning(
                "more than %d connections: those that wait for their clients are closed; see "
                "--max-connections",
                self.most,
            )
        self._full = full

    def remove(self, connection: ClientConnection) -> None:
        if connection not in self._all:
            return
        self._all.remove(connection)
        self._set_wait(connection, None)
        self._unassign(connection)
        self._by_address[connection.address] -= 1
        if not self._by_address[connection.address]:
            del self._by_address[connection.address]
            self._full_addresses.discard(connection.address)

    def update(self, connection: ClientConnection) -> None:
        """Call this after each event that may change what a connection waits for, or its holder."""
        if connection not in self._all:
            return
        wait, holder = connection.expects(), connection.current_holder()
        if holder != connection.holder:
            self._unassign(connection)
            connection.holder = holder
            self._assign(connection)
        if wait is not connection.wait:
            self._set_wait(connection, wait)

    def pacing_delay_s(self, connection: ClientConnection, chunks: int) -> float:
        """Seconds to read nothing from a connection that just sent ``chunks`` chunks of a body. The
        rate of chunks is limited because parsing one costs the same however small it is."""
        if chunks <= FREE_BODY_CHUNKS or connection not in self._all:
            return 0.0
        held, now = self._by_holder[connection.holder], connection.loop.time()
        held.paced_until = max(now, held.paced_until) + chunks / BODY_CHUNKS_PER_S
        return held.paced_until - now

    def _assign(self, connection: ClientConnection) -> None:
        held = self._by_holder.setdefault(connection.holder, HeldConnections())
        held.size += 1
        if connection.wait is not None:
            held.waiting(connection.wait)[connection] = None

    def _unassign(self, connection: ClientConnection) -> None:
        held = self._by_holder[connection.holder]
        held.size -= 1
        if connection.wait is not None:
            del held.waiting(connection.wait)[connection]
        if not held.size:
            del self._by_holder[connection.holder]

    def _set_wait(self, connection: ClientConnection, wait: Wait | None) -> None:
        """Begins a wait, or restarts the same one after progress."""
        held, loop = self._by_holder[connection.holder], connection.loop
        if connection.timer is not None:
            connection.timer.cancel()
        if connection.wait is not None:
            del held.waiting(connection.wait)[connection]
        connection.wait = wait
        if wait is None:
            return
        held.waiting(wait)[connection] = None
        connection.since, connection.progress_before = loop.time(), connection.progress()
        if wait is Wait.HEAD:
            connection.timer = loop.call_later(connection.head_timeout_s, connection.close)
        else:
            connection.timer = loop.call_later(CHECK_S, self._check_progress, connection)

    def _check_progress(self, connection: ClientConnection) -> None:
        """Closes a connection whose client does not read its answer, or leaves a message
        incomplete. A body that stops arriving is left to ``gateway.api.http``, which sends the
        client an error."""
        if connection.progress() - connection.progress_before >= PROGRESS_BYTES:
            self._set_wait(connection, connection.wait)
            return
        stalled_s = connection.loop.time() - connection.since
        closes = connection.wait in (Wait.READER, Wait.MESSAGE)
        if closes and stalled_s >= self.stall_timeout_s:
            did = "read" if connection.wait is Wait.READER else "sent"
            log.info(
                "%s %s less than %d bytes in %g s: its connection is closed; see --stall-timeout-s",
                connection.holder, did, PROGRESS_BYTES, self.stall_timeout_s,
            )  # fmt: skip
            connection.close()
            return
        connection.timer = connection.loop.call_later(CHECK_S, self._check_progress, connection)

    def _close_for(self, new: ClientConnection) -> None:
        waiting = [held for held in self._by_holder.values() if held.idle or held.stalled]
        most = max(waiting, key=lambda held: held.size)  # Not empty: ``new`` waits for its headers.
        no_progress_since = new.loop.time() - NO_PROGRESS_S
        same_holder = most is self._by_holder[new.holder]
        (most.find_dispensable(no_progress_since, same_holder=same_holder) or new).close()

    def _refuse(self, new: ClientConnection) -> None:
        if new.address not in self._full_addresses:
            self._full_addresses.add(new.address)
            log.warning(
                "more than %d connections of %s: others are closed; see "
                "--max-connections-per-address",
                self.most_per_address, new.address,
            )  # fmt: skip
        new.close()


def allow_files(connections: int, workers: int) -> None:
    """Raises the soft limit on open files to what the connections of clients and workers need.
    Raises ConfigError if the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = OTHER_FILES + workers
    wanted = connections + others
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        lower = f", or set --max-connections {hard - others} or less" if hard > others else ""
        raise ConfigError(
            f"--max-connections {connections} needs {wanted} open files with those of {workers} "
            f"workers and of the gateway itself, and only {hard} are allowed: raise ulimit -n to "
            f"{wanted}{lower}",
            param="max_connections",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
