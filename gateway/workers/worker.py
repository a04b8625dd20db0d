"""One worker behind the gateway: its channel, what it says of itself, and what it has of ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum

import grpc

from gateway.edge.deadline import expired
from opticnerve.embeddings.store import StoreState
from opticnerve.errors import DeviceLost, OpticNerveError, Unavailable
from opticnerve.rpc.channel import open_channel
from opticnerve.rpc.errors import METADATA_KEY, from_rpc

_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED,  # Our token is refused: not a fault of our caller.
)
POLL_SERVING_S = 1.0
POLL_DOWN_S = (0.1, 0.1, 0.2, 0.2, 0.5, 1.0)  # After one failure, two, ...; the last goes on.


class WorkerState(Enum):
    STARTING = "starting"  # Not reached yet, or reached and not ready.
    SERVING = "serving"
    DRAINING = "draining"  # Finishes what it has and takes nothing new.
    DEAD = "dead"  # Was reached once, and is not now.
    UNUSABLE = "unusable"  # Answers, and can be given no work; its fault says why.


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker says of itself; the same shape for encoders and LLM workers.

    Cost is in the pool's unit: patches for encoders, sequences for LLM workers.
    """

    fingerprint: str = ""
    pair_id: str = ""
    family: str = ""
    device: str = ""
    dtype: str = ""
    version: str = ""
    shm_tier_id: str = ""
    hidden_size: int = 0
    draining: bool = False
    cost: int = 0  # Pending cost by the worker's own count.
    cost_per_s: float = 0.0  # Its throughput while it has work, as it measured it; 0: not known.
    window: int = 0  # Cost that one gateway keeps with it at a time; 0: any.
    heavy_window: int = 0  # The same of heavy work, beside the other.
    limits: dict[str, int] = field(default_factory=dict)
    load: dict[str, int] = field(default_factory=dict)
    store: StoreState | None = None
    instance_id: str = ""  # Of the process; empty: it does not tell.
    fetch_address: str = ""  # What an encoder's references name.
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fault:
    """What somebody has to put right about a worker that answers, in words that say how."""

    text: str
    usable: bool = False  # Whether it is given work all the same.


Describe = Callable[[grpc.aio.Channel, float], Awaitable[Description]]


class Worker:
    """One address: its channel, its state, and the cost that we have with it."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address
        self.channel = open_channel(address, token)
        self.state = WorkerState.STARTING
        self.description = Description()
        self.fault: Fault | None = None
        self.pending = 0
        self.heavy = 0  # Of that: what keeps its device waiting, see ``Job.heavy``.
        self.foreign = 0  # Reported cost that is not ours, at the last report.
        self.last_picked = 0
        self.failures = 0
        self.full_until = 0.0  # On the monotonic clock: it refused work for lack of room.
        self.wake = asyncio.Event()  # Set: probe now.
        self.idle = asyncio.Event()  # Set while nobody has the worker on loan.
        self.idle.set()
        self._loans = 0

    def lend(self, cost: int, heavy: bool = False) -> None:
        self._loans += 1
        self.pending += cost
        self.heavy += cost if heavy else 0
        self.idle.clear()

    def take_back(self, cost: int, heavy: bool = False) -> None:
        self._loans -= 1
        self.pending -= cost
        self.heavy -= cost if heavy else 0
        if not self._loans:
            self.idle.set()

    @property
    def cost_per_s(self) -> float:
        return self.description.cost_per_s

    def has_room(self, cost: int, heavy: bool = False) -> bool:
        """Whether it takes work of ``cost`` now. One piece fits, however large, where we have
        nothing else of its kind with it."""
        if time.monotonic() < self.full_until:
            return False
        window = self.description.heavy_window if heavy else self.description.window
        pending = self.heavy if heavy else self.pending - self.heavy
        return not window or not pending or pending + cost <= window

    def observe(
        self, description: Description | None, *, serving: bool, fault: Fault | None = None
    ) -> None:
        """Takes the outcome of one probe. No description: not reached, or refused by it."""
        self.fault = fault
        if description is not None:
            self.description = description
            self.foreign = max(0, description.cost - self.pending)
        usable = fault is None or fault.usable
        if serving and usable and description is not None and not description.draining:
            self.state, self.failures = WorkerState.SERVING, 0
            return
        self.failures += 1
        if not usable:
            self.state = WorkerState.UNUSABLE
        elif description is not None:
            self.state = WorkerState.DRAINING if description.draining else WorkerState.STARTING
        elif self.state is not WorkerState.STARTING:
            self.state = WorkerState.DEAD

    def poll_interval(self) -> float:
        if self.state is WorkerState.SERVING:
            return POLL_SERVING_S
        return POLL_DOWN_S[min(self.failures, len(POLL_DOWN_S) - 1)]


class WorkerLost(Unavailable):
    """A call ended without an answer: the worker died, drains, was never reached, or refuses our
    token.

    ``delivered``: it had our request when its connection broke, so the request may be the cause.
    """

    def __init__(self, message: str, *, delivered: bool) -> None:
        super().__init__(message, retry_after_s=5.0)
        self.delivered = delivered


def call_error(error: grpc.RpcError, *, delivered: bool) -> OpticNerveError:
    """What a failed call of a worker means: WorkerLost, or the worker's own typed error. Raise it
    ``from`` the RpcError."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return from_rpc(error)
    metadata = error.trailing_metadata() or ()
    typed = any(key == METADATA_KEY for key, _ in metadata)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not typed:
        return expired()
    if error.code() not in _BROKEN:
        answer = from_rpc(error)
        if isinstance(answer, DeviceLost):  # It will exit and be started again.
            return WorkerLost(answer.message, delivered=True)
        return answer
    return WorkerLost(
        "the connection to a worker was lost; retry later", delivered=delivered and not typed
    )
