"""Chooses the encoders and LLM workers that serve a request together.

Workers report a ``pair_id``, equal for those of one checkpoint; encoders also report the
fingerprint that is part of their embeddings' keys. Two revisions of a checkpoint can be served side
by side; a request is served by one of them from end to end. A gateway that knows its own
checkpoint's ``pair_id`` uses no other workers, since its tokenizer and template belong to that
checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from gateway.clock import Deadline
from gateway.workers.pool import UNUSABLE_WAIT_S, WorkerPool
from gateway.workers.worker import Worker, WorkerState
from opticnerve.errors import Mispaired, Unavailable, UnsupportedFeature

CHECK_S = 60.0  # Seconds between checks while no worker changes.


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers that one request may use. ``fingerprint``: the encoders', empty without pictures.
    ``max_model_len``, ``vocab_size``: the smallest among its LLM workers; 0: unknown."""

    pair_id: str
    fingerprint: str
    max_model_len: int = 0
    vocab_size: int = 0

    @property
    def system_fingerprint(self) -> str:
        return revision_of(self.pair_id)


def revision_of(pair_id: str) -> str:
    """The short form of a pair id; empty where it is unknown."""
    return pair_id and "fp_" + pair_id[:12]


class Pairing:
    """Chooses the pair for each request. ``own``: the pair id of the gateway's checkpoint, or None
    if it has no weights. Only workers with this id are used, and none until it is known."""

    def __init__(
        self,
        encoders: WorkerPool,
        llms: WorkerPool,
        own: asyncio.Future[str | None],
        worker_wait_s: float,
    ) -> None:
        self.encoders = encoders
        self.llms = llms
        self._own = own
        own.add_done_callback(lambda _: llms.changes.notify())
        self.worker_wait_s = worker_wait_s
        self.has_been_ready = False  # Whether text and pictures could ever both be served.

    async def watch_until_ready(self) -> None:
        """Waits until text and pictures can both be served, and sets ``has_been_ready``."""
        while self.missing():
            with contextlib.suppress(TimeoutError):
                await self.llms.changes.wait(CHECK_S)
        self.has_been_ready = True

    async def choose(self, *, pictures: bool, deadline: Deadline) -> Pair:
        """The best pair now: the one with most serving workers. Waits until workers have described
        themselves. Known workers that are down are the last choice; they still make a pair because
        an embedding in the store needs no encoder. Raises Unavailable, Mispaired where workers do
        not belong together, or UnsupportedFeature for pictures where no encoders are configured."""
        if pictures and not self.encoders.configured:
            raise UnsupportedFeature(
                "this server takes text alone: it was started without encoders "
                "(--encoder-addresses); send messages without pictures",
                param="messages",
            )
        waiting = deadline.within(self.worker_wait_s)
        while True:
            found = self.best(pictures=pictures)
            if found is not None:
                return found
            if not self.llms.configured:
                raise self._unavailable()
            if self.llms.unusable or (pictures and self.encoders.unusable):
                waiting = waiting.within(UNUSABLE_WAIT_S)
            try:
                await self.llms.changes.wait(waiting.remaining())
            except TimeoutError as error:
                raise self._unavailable() from error

    def missing(self, pictures: bool | None = None) -> list[str]:
        """Why a request could not be served now, in words; empty if it could.

        ``pictures``: whether it has any; None: whether this gateway is configured for them.
        """
        if not self._own.done():
            return ["the gateway is reading its checkpoint's weights, to identify it"]
        llms = {w.description.pair_id for w in self.llms.serving(self._is_ours)}
        if not (self.encoders.configured if pictures is None else pictures):
            return [] if llms else [self.llms.absence(self._is_ours)]
        encoders = {w.description.pair_id for w in self.encoders.serving(self._is_ours)}
        if llms & encoders:
            return []
        lacking = [
            pool.absence(self._is_ours)
            for pool, ids in ((self.encoders, encoders), (self.llms, llms))
            if not ids
        ]
        return lacking or ["encoders and LLM workers serve different checkpoints"]

    def best(self, *, pictures: bool) -> Pair | None:
        """The best pair now; None while no worker has described itself. Ties are broken by id, so
        that all gateways choose the same."""
        best: tuple[tuple[int, ...], Pair] | None = None
        for pair_id in sorted({w.description.pair_id for w in self._described(self.llms)}):
            llms = [w for w in self._described(self.llms) if w.description.pair_id == pair_id]
            length, vocabulary = _least(llms, "max_model_len"), _least(llms, "vocab_size")
            for fingerprint, serving in self._fingerprints(pair_id, pictures):
                rank = (min(_serving(llms), 1), min(serving, 1), serving, _serving(llms))
                if best is None or rank > best[0]:
                    best = rank, Pair(pair_id, fingerprint, length, vocabulary)
        return best[1] if best else None

    def _fingerprints(self, pair_id: str, pictures: bool) -> list[tuple[str, int]]:
        """(fingerprint, number of serving encoders) of a pair; one empty fingerprint for text."""
        if not pictures:
            return [("", 0)]
        groups: dict[str, int] = {}
        for worker in self._described(self.encoders):
            if worker.description.pair_id == pair_id:
                fingerprint = worker.description.fingerprint
                groups[fingerprint] = groups.get(fingerprint, 0) + _serving([worker])
        return sorted(groups.items())

    def _described(self, pool: WorkerPool) -> list[Worker]:
        return [w for w in pool.workers if w.description.fingerprint and self._is_ours(w)]

    def _is_ours(self, worker: Worker) -> bool:
        return self._own.done() and self._own.result() in (None, worker.description.pair_id)

    def _unavailable(self) -> Unavailable:
        words = "; ".join(self.missing()) or "workers are starting"
        both = self.encoders.serving() and self.llms.serving()
        cls = Mispaired if both else Unavailable
        return cls(f"{words}; retry later", retry_after_s=5.0)


def _serving(workers: list[Worker]) -> int:
    return sum(worker.state is WorkerState.SERVING for worker in workers)


def _least(workers: list[Worker], limit: str) -> int:
    """The smallest value of a limit among workers that report it; 0 when none does."""
    values = [w.description.limits.get(limit, 0) for w in workers]
    return min((value for value in values if value), default=0)
