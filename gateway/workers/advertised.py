"""Whether LLM workers can have what an encoder makes: its advertised address, and its store key.

LLM workers fetch embeddings from the address which they find in no store. Each process makes an id
when it starts, which its health check knows as a service: whoever answers for the id at the address
is the process that told it. That needs no token, so none is sent to where a typing error leads.

What leaves a machine is signed with the secret of --store-key-file. LLM workers that have another
one refuse it, so every picture would fail.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import grpc

from gateway.workers.pool import PROBE_TIMEOUT_S, WorkerPool
from gateway.workers.worker import Description, Fault, Worker
from opticnerve.rpc.channel import is_instance, open_channel

RECHECK_S = 2.0  # While an address is wrong.


@dataclass(frozen=True, slots=True)
class _Seen:
    """Who answered at an encoder's address when it was last asked; empty: the encoder."""

    what: tuple[str, str]  # The instance that was asked for, and the address.
    who: str
    at: float  # On the monotonic clock.


class AdvertisedCheck:
    """Checks each encoder once it is discovered, and on while its address is wrong. ``llms``: who
    has to reach its embeddings."""

    def __init__(self, llms: WorkerPool) -> None:
        self._llms = llms
        self._seen: WeakKeyDictionary[Worker, _Seen] = WeakKeyDictionary()

    async def __call__(self, encoder: Worker, told: Description) -> Fault | None:
        """What is wrong with the encoder's store key, or with the address that it told; None for
        nothing, and for encoders of earlier releases, which tell none."""
        fault = self._foreign_key(told)
        if fault is not None or not told.instance_id or not told.fetch_address:
            return fault
        who = await self._who_answers(encoder, told)
        if not who:
            return None
        wrong = f"advertises {told.fetch_address} (--advertise), where {who} answers"
        if self._is_fetch_needed(told):
            return Fault(
                f"{wrong}: LLM workers could not fetch its embeddings, and it gets no pictures; "
                "start it with --advertise HOST:PORT at which gateway and LLM workers reach it"
            )
        return Fault(
            f"{wrong}: LLM workers have its embeddings from the store alone; start it with "
            "--advertise HOST:PORT at which gateway and LLM workers reach it",
            usable=True,
        )

    def _foreign_key(self, told: Description) -> Fault | None:
        """Of LLM workers that do not have the encoder's store key, those on its machine aside."""
        llms = self._llms.serving()
        foreign = [llm for llm in llms if _is_foreign(told, llm.description)]
        if not foreign:
            return None
        refusing = [llm for llm in foreign if _key_id(llm.description)]
        what = "refuse its embeddings" if refusing else "find none of its embeddings in Redis"
        return Fault(
            f"has not the --store-key-file of LLM {', '.join(llm.address for llm in foreign)}, "
            f"which {what}: give all encoders and LLM workers the same one, and start again "
            "whichever has read an older one",
            usable=len(refusing) < len(llms),
        )

    async def _who_answers(self, encoder: Worker, told: Description) -> str:
        """Who answers in the encoder's place, "another process" or "nothing"; empty: itself."""
        what, now = (told.instance_id, told.fetch_address), time.monotonic()
        seen = self._seen.get(encoder)
        if seen is None or seen.what != what or (seen.who and now - seen.at >= RECHECK_S):
            who = await _ask(told.fetch_address, told.instance_id)
            seen = self._seen[encoder] = _Seen(what, who, now)
        return seen.who

    def _is_fetch_needed(self, told: Description) -> bool:
        """Whether some LLM worker does not read what the encoder stores."""
        others = [llm.description for llm in self._llms.serving()]
        return not others or not all(_share_a_store(told, other) for other in others)


def _share_a_store(one: Description, other: Description) -> bool:
    if one.shm_tier_id and one.shm_tier_id == other.shm_tier_id:
        return True
    stores = one.store, other.store
    return _key_id(one) == _key_id(other) and all(
        store is not None and store.kind == "redis" and store.reachable for store in stores
    )


def _is_foreign(encoder: Description, llm: Description) -> bool:
    if encoder.store is None or llm.store is None:
        return False  # Of earlier releases, which do not tell.
    same_machine = bool(encoder.shm_tier_id) and encoder.shm_tier_id == llm.shm_tier_id
    return not same_machine and _key_id(encoder) != _key_id(llm)


def _key_id(told: Description) -> str:
    return told.store.key_id if told.store else ""


async def _ask(address: str, instance_id: str) -> str:
    channel = open_channel(address)
    try:
        same = await is_instance(channel, instance_id, PROBE_TIMEOUT_S)
    except grpc.RpcError:
        return "nothing"
    finally:
        await channel.close()
    return "" if same else "another process"
