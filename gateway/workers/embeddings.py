"""One request's embeddings: encodes all items concurrently, and again if their rows are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway import metrics
from gateway.clock import Deadline
from gateway.media.reader import located
from gateway.workers.encode import Encodable, Encoded, Encoders
from opticnerve.embeddings.ref import EmbeddingRef
from opticnerve.errors import (
    EmbeddingNotFound,
    InvalidRequest,
    OpticNerveError,
    PayloadTooLarge,
)
from opticnerve.generation.generate_stream import StreamPolicy
from opticnerve.telemetry import traces
from opticnerve.telemetry.metrics import CACHE_LOOKUPS

MAX_REENCODES = StreamPolicy().max_reencodes


@dataclass
class _Item:
    """One item of a request, and the state of its encoding."""

    item: Encodable
    task: asyncio.Task[Encoded] | None = None
    ref: EmbeddingRef | None = None
    first: Encoded | None = None  # The first encoding; timings report this one.
    bytes_sent: int = 0  # In all encodings together.
    losses: int = 0  # How often LLM workers found no rows behind its reference.


class RequestEmbeddings:
    """The embeddings of a request's distinct items, by content key.

    Entering the context starts to encode every item without a known reference, all concurrently;
    leaving it cancels encodings that still run. In an error that leaves the context, a content key
    in ``param`` is replaced by the path of the item's field in the request.
    """

    def __init__(
        self, encoders: Encoders, items: Sequence[Encodable], request_id: str, deadline: Deadline
    ) -> None:
        self._encoders = encoders
        self._request_id = request_id
        self._deadline = deadline
        self._items: dict[str, _Item] = {}
        for item in items:
            self._items.setdefault(item.key, _Item(item))

    async def __aenter__(self) -> RequestEmbeddings:
        """Raises Overloaded if the items would wait too long for an encoder."""
        if self._items:
            self._encoders.admit([each.item for each in self._items.values()], self._deadline)
        for each in self._items.values():
            self._begin(each)
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
            self._encoders.leave(key)
        self._items.clear()  # Frees the pictures' bytes.

    # ---- references

    def known(self, key: str) -> EmbeddingRef | None:
        """The reference, or None if it is not known yet."""
        return self._items[key].ref

    async def ready(self, key: str) -> EmbeddingRef:
        entry = self._items[key]
        if entry.ref is not None:
            return entry.ref
        assert entry.task is not None  # Started by _begin() or again().
        return (await asyncio.shield(entry.task)).ref

    async def again(self, key: str, reason: str) -> EmbeddingRef:
        """Encodes the item again. Raises EmbeddingNotFound after too many losses."""
        entry = self._items.get(key)
        if entry is None:
            raise EmbeddingNotFound("the LLM worker asked for a picture that is not in the request")
        if entry.ref is not None or entry.task is None or entry.task.done():
            if reason != "PREEMPTED":
                entry.losses += 1
                entry.item = replace(entry.item, lost=True)
            if entry.losses > MAX_REENCODES:
                raise EmbeddingNotFound(
                    "a picture's embedding was lost repeatedly between encoder and LLM "
                    "worker; check that both reach the same store and have one --store-key-file",
                )
            metrics.REENCODES.labels(reason.lower()).inc()
            self._encoders.references.pop(key)
            self._encode(entry)
        return await self.ready(key)

    @property
    def encoding(self) -> bool:
        """Whether any item is being encoded, or has been."""
        return any(entry.task is not None for entry in self._items.values())

    # ---- for timings

    def outcomes(self) -> dict[str, Encoded]:
        """The first encoding of each item that is ready, by key."""
        return {key: entry.first for key, entry in self._items.items() if entry.first}

    @property
    def bytes_sent(self) -> int:
        return sum(entry.bytes_sent for entry in self._items.values())

    # ---- encoding

    def _begin(self, entry: _Item) -> None:
        known = self._encoders.references.get(entry.item.key)
        CACHE_LOOKUPS.labels("reference", "hit" if known else "miss").inc()
        if known is None:
            self._encode(entry)
        else:
            entry.ref, entry.first = known, Encoded(known, "ref")
            with traces.span("picture", cached="ref", **_size(entry.item)):
                pass

    def _encode(self, entry: _Item) -> None:
        entry.ref = None
        entry.task = asyncio.create_task(self._run(entry))
        entry.task.add_done_callback(_retrieve)

    async def _run(self, entry: _Item) -> Encoded:
        with traces.span("picture", again=entry.item.lost or None, **_size(entry.item)) as span:
            try:
                encoded = await self._encoders.encode(entry.item, self._deadline, self._request_id)
            except (InvalidRequest, PayloadTooLarge) as error:
                raise located(error, entry.item.param) from error
            span.set(cached=encoded.cached)
        entry.ref = encoded.ref
        entry.first = entry.first or encoded
        entry.bytes_sent += encoded.bytes_sent
        return encoded


def _size(item: Encodable) -> dict[str, Any]:
    """The picture's, as attributes of a span."""
    return {"patches": item.plan.num_patches, "tokens": item.plan.num_tokens}


def _retrieve(task: asyncio.Task[Encoded]) -> None:
    """Retrieves a failure, which asyncio would log if no one awaited the task."""
    if not task.cancelled():
        task.exception()
