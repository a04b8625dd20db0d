"""The embeddings of one request: all items are encoded at once, references come as they finish."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gateway import metrics
from gateway.edge.deadline import Deadline
from gateway.media.reader import located
from gateway.workers.encode import Encodable, Encoded, Encoders
from gateway.workers.generate import POLICY
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import (
    EmbeddingNotFound,
    InvalidRequest,
    OpticNerveError,
    PayloadTooLarge,
)


@dataclass
class _Item:
    item: Encodable
    task: asyncio.Task[Encoded] | None = None
    ref: EmbeddingRef | None = None
    first: Encoded | None = None  # The first encoding, which is the one that timings report.
    bytes_sent: int = 0  # By all encodings.
    losses: int = 0  # How often LLM workers found no rows behind its reference.


@dataclass
class RequestEmbeddings:
    """The distinct items of a request, by content key; an asynchronous context manager.

    Leaving the context cancels encodings under way. An error that leaves it and names a key gets
    the name of the request's field that holds the item instead.
    """

    encoders: Encoders
    request_id: str
    deadline: Deadline
    _items: dict[str, _Item] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        encoders: Encoders,
        items: Sequence[Encodable],
        request_id: str,
        deadline: Deadline,
    ) -> RequestEmbeddings:
        """Starts to encode every distinct item without a known reference.

        Raises Overloaded if they would wait too long for an encoder.
        """
        if items:
            encoders.admit(items, deadline)
        made = cls(encoders, request_id, deadline)
        for item in items:
            if item.key not in made._items:
                made._add(item)
        return made

    async def __aenter__(self) -> RequestEmbeddings:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, OpticNerveError) and error.param in self._items:
            error.param = self._items[error.param].item.param
        tasks = [entry.task for entry in self._items.values() if entry.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for key in self._items:
            self.encoders.leave(key)
        self._items.clear()  # The bytes go with them.

    # ---- references, for a FailoverGeneration

    def known(self, key: str) -> EmbeddingRef | None:
        return self._items[key].ref

    async def ready(self, key: str) -> EmbeddingRef:
        entry = self._items[key]
        if entry.ref is not None:
            return entry.ref
        assert entry.task is not None  # Started by begin() or again().
        return (await asyncio.shield(entry.task)).ref

    async def again(self, key: str, reason: str) -> EmbeddingRef:
        """Encodes the item again. Raises EmbeddingNotFound beyond ``POLICY.max_reencodes``."""
        entry = self._items.get(key)
        if entry is None:
            raise EmbeddingNotFound("the LLM worker asks for a picture that was not sent to it")
        if entry.ref is not None or entry.task is None or entry.task.done():
            if reason != "PREEMPTED":
                entry.losses += 1
                entry.item = replace(entry.item, lost=True)
            if entry.losses > POLICY.max_reencodes:
                raise EmbeddingNotFound(
                    "a picture's embedding was lost again and again between encoder and LLM "
                    "worker; check that both reach the same store and have one --store-key-file",
                )
            self.encoders.references.pop(key)
            self._encode(entry)
        return await self.ready(key)

    @property
    def encoding(self) -> bool:
        """Whether some item is being encoded, or was."""
        return any(entry.task is not None for entry in self._items.values())

    # ---- for timings

    def outcomes(self) -> dict[str, Encoded]:
        """The first encoding of each item that is ready, by key."""
        return {key: entry.first for key, entry in self._items.items() if entry.first}

    @property
    def bytes_sent(self) -> int:
        return sum(entry.bytes_sent for entry in self._items.values())

    # ---- encoding

    def _add(self, item: Encodable) -> None:
        entry = self._items[item.key] = _Item(item)
        known = self.encoders.references.get(item.key)
        metrics.CACHE_LOOKUPS.labels("reference", "hit" if known else "miss").inc()
        if known is None:
            self._encode(entry)
        else:
            entry.ref, entry.first = known, Encoded(known, "ref")

    def _encode(self, entry: _Item) -> None:
        entry.ref = None
        entry.task = asyncio.create_task(self._run(entry))
        entry.task.add_done_callback(_retrieve)

    async def _run(self, entry: _Item) -> Encoded:
        try:
            encoded = await self.encoders.encode(entry.item, self.deadline, self.request_id)
        except (InvalidRequest, PayloadTooLarge) as error:
            raise located(error, entry.item.param) from error
        entry.ref = encoded.ref
        entry.first = entry.first or encoded
        entry.bytes_sent += encoded.bytes_sent
        return encoded


def _retrieve(task: asyncio.Task[Encoded]) -> None:
    """Marks a failure as seen, or asyncio would log it where nobody waits for the task."""
    if not task.cancelled():
        task.exception()
