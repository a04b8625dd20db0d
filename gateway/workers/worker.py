"""One worker behind the gateway: its channel, its state, its description, and our work with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import grpc

from gateway.clock import expired
from gateway.workers.discovery import AddressSource
from opticnerve.embeddings.store import StoreState
from opticnerve.errors import DeviceLost, OpticNerveError, Unavailable
from opticnerve.rpc.channel import is_serving, open_channel
from opticnerve.rpc.convert import numbers_of, store_state_from_pb
from opticnerve.rpc.errors import METADATA_KEY, from_rpc
from opticnerve.rpc.tls import ChannelTls
from opticnerve.telemetry.throughput import Throughput

log = logging.getLogger(__name__)

_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED,  # The gateway's token, not the client's.
)
PROBE_TIMEOUT_S = 2.0
POLL_SERVING_S = 1.0
POLL_DOWN_S = (0.1, 0.1, 0.2, 0.2, 0.5, 1.0)  # After one failure, two, and so on.


class WorkerState(Enum):
    STARTING = "starting"  # Not reached yet, or reached and not ready.
    SERVING = "serving"
    DRAINING = "draining"  # Finishes its work and takes nothing new.
    DEAD = "dead"  # Was reached before, but is not now.
    ALIAS = "alias"  # A second address of a known process: it gets no work.
    UNUSABLE = "unusable"  # Answers, but can do no work for us; its fault says why.


@dataclass(frozen=True, slots=True)
class Description:
    """A worker's answer to Describe, of either kind.

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
    cost: int = 0  # Pending work of all gateways.
    cost_per_s: float = 0.0  # Its measured throughput while it has work; 0: unknown.
    max_cost_in_flight: int = 0  # For one gateway; 0: unlimited.
    max_heavy_cost_in_flight: int = 0  # For heavy work, in addition to the above.
    limits: dict[str, int] = field(default_factory=dict)
    load: dict[str, int] = field(default_factory=dict)
    store: StoreState | None = None
    instance_id: str = ""  # The process's id; empty: not reported.
    fetch_address: str = ""  # The address in references that an encoder returns.
    extra: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, answer: Any, **others: Any) -> Description:
        """From an answer to Describe: its fields of the same names, and ``others``."""
        limits, load = numbers_of(answer.limits), numbers_of(answer.load)
        draining = bool(load.pop("draining"))
        store = store_state_from_pb(answer.store)
        derived = {"limits": limits, "load": load, "draining": draining, "store": store, **others}
        names = {each.name for each in answer.DESCRIPTOR.fields}
        same = {each.name for each in fields(cls)} & names - derived.keys()
        return cls(**{name: getattr(answer, name) for name in same}, **derived)


@dataclass(frozen=True, slots=True)
class Fault:
    """A misconfiguration of a worker that answers, and how an operator corrects it."""

    text: str
    usable: bool = False  # Whether the worker gets work in spite of it.


Describe = Callable[[grpc.aio.Channel, float], Awaitable[Description]]
"""Calls Describe on a channel, with a timeout in seconds."""

REFUSED = Fault(
    "refuses this gateway's calls: give both the same --rpc-token-file, and restart the one that "
    "read an older one"
)


class Worker:
    """One address: its channel, its state, and the cost of our work with it."""

    def __init__(
        self, address: str, token: str | None = None, tls: ChannelTls | None = None
    ) -> None:
        self.address = address
        self.sources: set[AddressSource] = set()  # Those that list it.
        self.channel = open_channel(address, token, tls)
        self.state = WorkerState.STARTING
        self.description = Description()
        self.fault: Fault | None = None
        self.pending = 0
        self.heavy = 0  # The part of ``pending`` that is heavy, see ``LeaseRequest.heavy``.
        self.cost_of_other_gateways = 0  # As the worker reports it.
        self.last_picked = 0
        self.failures = 0
        self.full_until = 0.0  # Monotonic time; set when it refused work for lack of room.
        self.wake = asyncio.Event()  # Set it to probe the worker at once.
        self.throughput = Throughput()  # For this gateway's work.
        self.idle = asyncio.Event()  # Set while it is lent to nothing.
        self.idle.set()

    def lend(self, cost: int, heavy: bool = False) -> None:
        if not self.pending:
            self.throughput.begin()
        self.pending += cost
        self.heavy += cost if heavy else 0
        self.idle.clear()

    def take_back(self, cost: int, heavy: bool = False, *, done: bool = True) -> None:
        """``done``: whether the worker has done the work."""
        if done:
            self.throughput.record(cost)
        self.pending -= cost
        self.heavy -= cost if heavy else 0
        if not self.pending:
            self.idle.set()

    @property
    def cost_per_s(self) -> float:
        return self.description.cost_per_s

    def has_room(self, cost: int, heavy: bool = False) -> bool:
        """Whether the worker takes work of ``cost`` now. Any cost fits while it has no work of the
        same kind (heavy or not) from this gateway."""
        if time.monotonic() < self.full_until:
            return False
        described = self.description
        most = described.max_heavy_cost_in_flight if heavy else described.max_cost_in_flight
        pending = self.heavy if heavy else self.pending - self.heavy
        return not most or not pending or pending + cost <= most

    async def probe(self, kind: str, describe: Describe, check: Check | None) -> None:
        """Asks for its health and description, and updates its state. ``kind``: for log lines."""
        try:
            serving, description = await asyncio.gather(
                is_serving(self.channel, PROBE_TIMEOUT_S), describe(self.channel, PROBE_TIMEOUT_S)
            )
            fault = await check(self, description) if check else None
        except grpc.RpcError as error:
            refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
            self._update(None, serving=False, fault=REFUSED if refused else None)
        except Exception:
            log.exception("%s %s: cannot be described", kind, self.address)
            self._update(None, serving=False, fault=None)
        else:
            self._update(description, serving=serving, fault=fault)

    def _update(
        self, description: Description | None, *, serving: bool, fault: Fault | None
    ) -> None:
        """``description``: None if the worker was not reached, or refused the call."""
        self.fault = fault
        if description is not None:
            self.description = description
            self.cost_of_other_gateways = max(0, description.cost - self.pending)
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

    @property
    def is_reached(self) -> bool:
        """Whether the last probe was answered."""
        return self.state not in (WorkerState.DEAD, WorkerState.ALIAS)

    def poll_interval(self) -> float:
        if self.state in (WorkerState.SERVING, WorkerState.ALIAS):
            return POLL_SERVING_S
        return POLL_DOWN_S[min(self.failures, len(POLL_DOWN_S) - 1)]


Check = Callable[[Worker, Description], Awaitable[Fault | None]]
"""Finds a misconfiguration of a worker that has described itself."""


class WorkerLost(Unavailable):
    """A call ended without an answer: the worker died, drains, was never reached, or refuses the
    gateway's token. ``delivered``: it had the request when its connection broke, so the request may
    be the cause."""

    def __init__(self, message: str, *, delivered: bool) -> None:
        super().__init__(message, retry_after_s=5.0)
        self.delivered = delivered


def call_error(error: grpc.RpcError, *, delivered: bool) -> OpticNerveError:
    """The typed error of a failed call: WorkerLost, or the worker's own error. Raise it
    ``from`` the RpcError."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return from_rpc(error)
    metadata = error.trailing_metadata() or ()
    typed = any(key == METADATA_KEY for key, _ in metadata)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not typed:
        return expired()
    if error.code() not in _BROKEN:
        answer = from_rpc(error)
        if isinstance(answer, DeviceLost):  # The worker will exit and be restarted.
            return WorkerLost(answer.message, delivered=True)
        return answer
    return WorkerLost(
        "the connection to a worker was lost; retry later", delivered=delivered and not typed
    )
