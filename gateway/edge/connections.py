"""Clients' connections: how many there may be, who loses one where they run short, and how long
one may wait for its client.

A connection waits for the whole head of a request, for more of its body, or for its client to take
more of an answer; otherwise it is at work, and left alone. Bytes that complete no head are no
progress, so that nobody keeps a connection by dripping. One that sends requests ahead, before the
last is answered, never rests, and counts among those that wait.

Bodies in crumbs, thousands of chunks of a byte or so, are read as fast as their holder's share of
the event loop allows.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from gateway.api.http import PROGRESS_BYTES
from gateway.edge.protocol import Connection, Wait
from opticnerve.errors import ConfigError

log = logging.getLogger(__name__)

FIRST_REST_S = 30.0  # Until the first request.
REST_S = 75.0  # Until the next one.
CHECK_S = 1.0  # Between two looks at what a client has brought of a body, or taken of an answer.
PATIENCE_S = 3.0  # Without progress; then another connection of the same holder may be worth more.
FREE_CHUNKS = 256  # Of a body, in one read of READ_BYTES.
CHUNKS_PER_S = 10_000  # Of all bodies of one holder, where they are more: a tenth of a core.
OTHER_FILES = 256  # Open besides connections: libraries, logs, pictures on their way.


@dataclass(slots=True, eq=False)
class Share:
    """The connections of one holder. Of those that wait, the longest without progress is first."""

    size: int = 0
    resting: dict[Connection, None] = field(default_factory=dict)  # Between requests.
    stalled: dict[Connection, None] = field(default_factory=dict)  # Amid one, or ahead.
    paid_until: float = 0.0  # Rest for its chunks. On the loop's clock.

    def waiting(self, wait: Wait) -> dict[Connection, None]:
        return self.resting if wait is Wait.HEAD else self.stalled

    def dispensable(self, patient_until: float, *, own: bool) -> Connection | None:
        """The one to lose. ``own``: to another of the same holder; then none is lost amid a request
        that made progress after ``patient_until``."""
        resting, stalled = next(iter(self.resting), None), next(iter(self.stalled), None)
        for connection in (resting, stalled):
            if connection is not None and connection.since <= patient_until:
                return connection
        return resting or (None if own else stalled)


class Connections:
    """All of one server. Where a new one does not fit, the holder of most connections loses one
    that waits for its client; where that is the new one's holder, and all are at work, the new one
    is closed. So one holder may have all while nobody else wants any."""

    def __init__(self, most: int, most_per_address: int = 0, stall_timeout_s: float = 30.0) -> None:
        """``most_per_address``: 0 is no bound. ``stall_timeout_s``: in which a client must take
        ``PROGRESS_BYTES`` of what is there for it."""
        self.most = most
        self.most_per_address = most_per_address
        self.stall_timeout_s = stall_timeout_s
        self._all: set[Connection] = set()
        self._shares: dict[str, Share] = {}
        self._by_address: Counter[str] = Counter()
        self._crowded = False
        self._crowding: set[str] = set()  # Addresses that were refused more.

    @property
    def holders(self) -> int:
        """How many keys and addresses have connections."""
        return len(self._shares)

    def connect(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> Connection:
        """What uvicorn calls for a protocol."""
        return Connection(self, config, server_state, app_state, _loop)

    def enter(self, connection: Connection) -> None:
        self._all.add(connection)
        self._by_address[connection.address] += 1
        self._join(connection)
        self.settle(connection)
        if 0 < self.most_per_address < self._by_address[connection.address]:
            self._refuse(connection)
            return
        crowded = len(self._all) > self.most
        if crowded:
            self._close_for(connection)
        if crowded and not self._crowded:
            log.warning(
                "more than %d connections: those that wait for their clients are closed; see "
                "--max-connections",
                self.most,
            )
        self._crowded = crowded

    def leave(self, connection: Connection) -> None:
        if connection not in self._all:
            return
        self._all.remove(connection)
        self._wait(connection, None)
        self._part(connection)
        self._by_address[connection.address] -= 1
        if not self._by_address[connection.address]:
            del self._by_address[connection.address]
            self._crowding.discard(connection.address)

    def settle(self, connection: Connection) -> None:
        """After anything that may have changed what a connection waits for, or whose it is."""
        if connection not in self._all:
            return
        wait, holder = connection.expects(), connection.current_holder()
        if holder != connection.holder:
            self._part(connection)
            connection.holder = holder
            self._join(connection)
        if wait is not connection.wait:
            self._wait(connection, wait)

    def rest_s(self, connection: Connection, chunks: int) -> float:
        """How long a connection reads nothing that has just brought so many chunks of a body. What
        parsing them takes does not depend on their bytes, so small ones are paid for in time."""
        if chunks <= FREE_CHUNKS or connection not in self._all:
            return 0.0
        share, now = self._shares[connection.holder], connection.loop.time()
        share.paid_until = max(now, share.paid_until) + chunks / CHUNKS_PER_S
        return share.paid_until - now

    def _join(self, connection: Connection) -> None:
        share = self._shares.setdefault(connection.holder, Share())
        share.size += 1
        if connection.wait is not None:
            share.waiting(connection.wait)[connection] = None

    def _part(self, connection: Connection) -> None:
        share = self._shares[connection.holder]
        share.size -= 1
        if connection.wait is not None:
            del share.waiting(connection.wait)[connection]
        if not share.size:
            del self._shares[connection.holder]

    def _wait(self, connection: Connection, wait: Wait | None) -> None:
        """From now on a connection waits for that; also again, after some progress."""
        share, loop = self._shares[connection.holder], connection.loop
        if connection.timer is not None:
            connection.timer.cancel()
        if connection.wait is not None:
            del share.waiting(connection.wait)[connection]
        connection.wait = wait
        if wait is None:
            return
        share.waiting(wait)[connection] = None
        connection.since, connection.mark = loop.time(), connection.moved()
        if wait is Wait.HEAD:
            seconds = FIRST_REST_S if connection.cycle is None else REST_S
            connection.timer = loop.call_later(seconds, connection.close)
        else:
            connection.timer = loop.call_later(CHECK_S, self._check, connection)

    def _check(self, connection: Connection) -> None:
        """Of one that waits amid a request. Of bodies that do not come, clients are told by
        ``gateway.api.http``."""
        if connection.moved() - connection.mark >= PROGRESS_BYTES:
            self._wait(connection, connection.wait)
            return
        stalled_s = connection.loop.time() - connection.since
        if connection.wait is Wait.READER and stalled_s >= self.stall_timeout_s:
            log.info(
                "%s took less than %d bytes of what it was answered in %g s: its connection is "
                "closed; see --stall-timeout-s",
                connection.holder, PROGRESS_BYTES, self.stall_timeout_s,
            )  # fmt: skip
            connection.close()
            return
        connection.timer = connection.loop.call_later(CHECK_S, self._check, connection)

    def _close_for(self, new: Connection) -> None:
        waiting = [share for share in self._shares.values() if share.resting or share.stalled]
        heaviest = max(waiting, key=lambda share: share.size)  # ``new`` waits for its head.
        patient_until = new.loop.time() - PATIENCE_S
        own = heaviest is self._shares[new.holder]
        (heaviest.dispensable(patient_until, own=own) or new).close()

    def _refuse(self, new: Connection) -> None:
        if new.address not in self._crowding:
            self._crowding.add(new.address)
            log.warning(
                "more than %d connections of %s: others are closed; see "
                "--max-connections-per-address",
                self.most_per_address, new.address,
            )  # fmt: skip
        new.close()


def allow_files(connections: int, workers: int) -> None:
    """Lets this process open as many files as so many connections of clients and workers need: the
    soft limit is raised where it is lower. Raises ConfigError where the hard one is lower too."""
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
