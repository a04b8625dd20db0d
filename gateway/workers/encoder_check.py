"""Checks that LLM workers can get an encoder's embeddings: its advertised address and store key.

LLM workers fetch embeddings that are in no store from the encoder's advertised address. Each
process makes an id when it starts, and its health service answers for that id: if the health
service at the advertised address knows the id, it is the encoder. This needs no token, so none is
sent to a mistyped address.

Embeddings that leave a machine are signed with the secret of --store-key-file. LLM workers with
another one refuse them, so every picture would fail.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import grpc

from gateway.workers.pool import WorkerPool
from gateway.workers.worker import PROBE_TIMEOUT_S, Description, Fault, Worker
from opticnerve.rpc.channel import is_instance, open_channel
from opticnerve.rpc.tls import ChannelTls

RECHECK_S = 2.0  # Interval while an address is wrong.


@dataclass(frozen=True, slots=True)
class _Answer:
    """The last result for one encoder. ``wrong_process``: see ``_find_wrong_process``."""

    asked: tuple[str, str]  # Instance id and address.
    wrong_process: str
    at: float  # On the monotonic clock.


class ReachabilityCheck:
    """Checks each encoder when it is discovered, and again while its address is wrong. ``llms``:
    the workers that have to get its embeddings."""

    def __init__(self, llms: WorkerPool, tls: ChannelTls | None = None) -> None:
        self._llms = llms
        self._tls = tls
        self._answers: WeakKeyDictionary[Worker, _Answer] = WeakKeyDictionary()

    async def __call__(self, encoder: Worker, description: Description) -> Fault | None:
        """A fault of the encoder's store key or advertised address; None if both are right, or the
        encoder is of an earlier release, which reports neither."""
        fault = self._find_key_fault(description)
        address = description.fetch_address
        if fault is not None or not description.instance_id or not address:
            return fault
        process = await self._find_wrong_process(encoder, description)
        if not process:
            return None
        wrong = f"advertises {address} (--advertise), where {process} answers"
        if self._is_fetch_needed(description):
            return Fault(
                f"{wrong}: LLM workers could not fetch its embeddings, and it gets no pictures; "
                "start it with --advertise HOST:PORT at which gateway and LLM workers reach it"
            )
        return Fault(
            f"{wrong}: LLM workers have its embeddings from the store alone; start it with "
            "--advertise HOST:PORT at which gateway and LLM workers reach it",
            usable=True,
        )

    def _find_key_fault(self, encoder: Description) -> Fault | None:
        """A fault if LLM workers on other machines do not have the encoder's store key."""
        llms = self._llms.serving()
        differing = [llm for llm in llms if _has_other_key(encoder, llm.description)]
        if not differing:
            return None
        refusing = [llm for llm in differing if _key_id(llm.description)]
        what = "refuse its embeddings" if refusing else "find none of its embeddings in Redis"
        return Fault(
            "does not use the --store-key-file of LLM "
            f"{', '.join(llm.address for llm in differing)}, which {what}: give all encoders and "
            "LLM workers the same file, and restart those that read an older one",
            usable=len(refusing) < len(llms),
        )

    async def _find_wrong_process(self, encoder: Worker, description: Description) -> str:
        """Who answers at the advertised address, if not the encoder: "another process" or
        "nothing"; empty if it is the encoder."""
        instance_id, address = asked = description.instance_id, description.fetch_address
        last, now = self._answers.get(encoder), time.monotonic()
        expired = last is not None and last.wrong_process and now - last.at >= RECHECK_S
        if last is None or last.asked != asked or expired:
            process = await _ask(open_channel(address, tls=self._tls), instance_id)
            last = self._answers[encoder] = _Answer(asked, process, now)
        return last.wrong_process

    def _is_fetch_needed(self, encoder: Description) -> bool:
        """Whether some LLM worker does not read the store that the encoder writes."""
        llms = [llm.description for llm in self._llms.serving()]
        return not llms or not all(_share_a_store(encoder, llm) for llm in llms)


def _share_a_store(one: Description, other: Description) -> bool:
    if one.shm_tier_id and one.shm_tier_id == other.shm_tier_id:
        return True
    stores = one.store, other.store
    return _key_id(one) == _key_id(other) and all(
        store is not None and store.kind == "redis" and store.reachable for store in stores
    )


def _has_other_key(encoder: Description, llm: Description) -> bool:
    if encoder.store is None or llm.store is None:
        return False  # An earlier release, which does not report its store.
    same_machine = bool(encoder.shm_tier_id) and encoder.shm_tier_id == llm.shm_tier_id
    return not same_machine and _key_id(encoder) != _key_id(llm)


def _key_id(description: Description) -> str:
    return description.store.key_id if description.store else ""


async def _ask(channel: grpc.aio.Channel, instance_id: str) -> str:
    """Who answers at the end of ``channel``, which is closed; see ``_find_wrong_process``."""
    try:
        same = await is_instance(channel, instance_id, PROBE_TIMEOUT_S)
    except grpc.RpcError:
        return "nothing"
    finally:
        await channel.close()
    return "" if same else "another process"
