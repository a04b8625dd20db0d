"""The asynchronous client of one LLM worker."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeAlias

from opticnerve.client.contents import (
    Content,
    MultiMediaInfo,
    Placed,
    Tensors,
    lay_out,
    place_ref,
    place_tensors,
)
from opticnerve.client.encoder import AsyncEncoderClient
from opticnerve.embeddings.ref import EmbeddingRef, Location
from opticnerve.embeddings.store import Store
from opticnerve.errors import EmbeddingUnavailable, InvalidRequest, PayloadTooLarge
from opticnerve.generation.generate_stream import GenerateStream, StreamEvent, StreamPolicy
from opticnerve.generation.values import (
    Delta,
    Done,
    Generation,
    PositionLogprobs,
    PromptPiece,
    Sampling,
    Usage,
    read_token_ids,
    whole_answer,
)
from opticnerve.pb import llm_pb2, llm_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.channel import open_channel
from opticnerve.rpc.errors import typed_errors
from opticnerve.rpc.tls import ChannelTls
from opticnerve.rpc.token import load_token

MAX_INLINE_BYTES = 7 * 2**20  # A message holds 8 MiB.
START_INLINE_BYTES = 2**20  # Of tensors in the Start message; more follow it.
STREAM_POLICY = StreamPolicy()

Contents: TypeAlias = MultiMediaInfo | Mapping[int, Any]


class AsyncLLMClient:
    """Generates token ids from token ids and contents, on the LLM worker at ``address``, host:port.

    ``encoder`` encodes contents that are pictures, and encodes them again if the worker has lost
    their rows. ``store`` (from ``opticnerve.embeddings.open.open_store``) carries tensors that are
    too large for a message. The worker must reach the same store; if it has a ``--store-key-file``,
    open the store with ``seal=Seal.load(FILE)`` (``opticnerve.embeddings.signing``). The caller
    closes both. ``rpc_token_file``: the worker's. ``tls``: for a worker with ``--tls-certificate``.
    Raises the errors of ``opticnerve.errors``.
    """

    def __init__(
        self,
        address: str,
        *,
        encoder: AsyncEncoderClient | None = None,
        store: Store | None = None,
        timeout_s: float = 600.0,
        rpc_token_file: str | Path | None = None,
        tls: ChannelTls | None = None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._encoder = encoder
        self._store = store
        self._channel = open_channel(address, load_token(rpc_token_file), tls)
        self._stub = llm_pb2_grpc.LLMStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Aborts every running generation."""
        await self._channel.close()

    async def describe(self, timeout_s: float | None = None) -> llm_pb2.DescribeLLMResponse:
        """The worker's identity, limits and load."""
        request, patience_s = llm_pb2.DescribeLLMRequest(), timeout_s or self.timeout_s
        with typed_errors():
            return await self._stub.Describe(request, timeout=patience_s)

    async def generate(
        self,
        token_ids: Sequence[int],
        contents: Contents | None = None,
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Generation:
        """The whole answer. See ``stream``."""
        stream = await self._open(token_ids, contents, sampling, request_id, timeout_s)
        deltas, usage = [], Usage()
        prompt: list[PositionLogprobs] = []
        async for event in _events(stream):
            match event:
                case PromptPiece(logprobs=logprobs):
                    prompt += logprobs
                case Delta():
                    deltas.append(event)
                case Done():
                    usage = event.usage
        return whole_answer(deltas, usage, tuple(prompt))

    async def stream(
        self,
        token_ids: Sequence[int],
        contents: Contents | None = None,
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """New tokens as they arrive. Closing the iterator early aborts the generation.

        ``token_ids`` has as many placeholders for every content as it has rows. ``contents`` may
        also be the mapping from which ``MultiMediaInfo`` is made. The answer ends with one of
        ``sampling.eos_token_ids``, by default the checkpoint's, or after ``max_tokens``. Raises
        InvalidRequest if prompt and contents do not fit, and the errors in ``llm.proto``.
        """
        stream = await self._open(token_ids, contents, sampling, request_id, timeout_s)
        async with contextlib.aclosing(_events(stream)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    yield event

    async def _open(
        self,
        token_ids: Sequence[int],
        contents: Contents | None,
        sampling: Sampling | None,
        request_id: str,
        timeout_s: float | None,
    ) -> GenerateStream:
        ids = read_token_ids("token_ids", token_ids)
        found = contents if isinstance(contents, MultiMediaInfo) else MultiMediaInfo(contents)
        resolved, placed = await asyncio.gather(
            self._resolve(sampling, timeout_s),
            asyncio.gather(*(self._place(*content) for content in found)),
        )
        refs, spans = lay_out(ids, placed)
        start = llm_pb2.Start(
            request_id=request_id or f"client-{uuid.uuid4().hex[:16]}",
            token_ids=ids,
            spans=[convert.span_to_pb(span) for span in spans],
            items=items_of(refs),
            sampling=convert.sampling_to_pb(resolved),
        )
        source = ContentReferences(refs, placed, self._encoder)
        return GenerateStream(self._stub, start, source, timeout_s or self.timeout_s, STREAM_POLICY)

    async def _resolve(self, sampling: Sampling | None, timeout_s: float | None) -> Sampling:
        """``sampling`` with ``eos_token_ids``. The worker is asked each time, because another one
        may have this address by now."""
        if not isinstance(sampling, Sampling | None):
            kind = type(sampling).__name__
            raise InvalidRequest(f"sampling is a Sampling(...), not {kind}", param="sampling")
        sampling = sampling or Sampling()
        if sampling.eos_token_ids is not None or sampling.ignore_eos:
            return sampling
        told = await self.describe(timeout_s)
        return replace(sampling, eos_token_ids=tuple(told.eos_token_ids))

    async def _place(self, token_id: int, content: Content) -> Placed:
        if isinstance(content, EmbeddingRef):
            return place_ref(token_id, content)
        if isinstance(content, Tensors):
            return await self._place_tensors(token_id, content)
        if self._encoder is None:
            raise InvalidRequest("pictures as contents need an encoder: LLMClient(encoder=...)")
        return place_ref(token_id, await self._encoder.encode(content), content)

    async def _place_tensors(self, token_id: int, content: Tensors) -> Placed:
        placed = await asyncio.to_thread(place_tensors, token_id, content)
        data = placed.ref.location.inline
        if len(data) <= MAX_INLINE_BYTES:
            return placed
        if self._store is None:
            raise PayloadTooLarge(
                f"tensors of {len(data)} bytes do not fit a message; give the client a store "
                "that the worker reaches: LLMClient(store=open_store(URL))"
            )
        await asyncio.to_thread(self._store.put_bytes, placed.ref.key, data)
        location = Location(shm_tier_id=self._store.tier_id, redis=self._store.shared)
        return replace(placed, ref=placed.ref.at(location))


async def _events(stream: GenerateStream) -> AsyncGenerator[StreamEvent, None]:
    """The stream's events, with its errors typed."""
    with typed_errors():
        async with contextlib.aclosing(stream.events()) as events:
            async for event in events:
                yield event


def items_of(refs: Sequence[EmbeddingRef]) -> list[llm_pb2.Item]:
    """The items of Start with their references. References with large inline rows are left out;
    they are sent in separate messages."""
    items, room = [], START_INLINE_BYTES
    for ref in refs:
        inline = bool(ref.location.inline)
        room -= len(ref.location.inline)
        fits = room >= 0 or not inline
        items.append(convert.item_to_pb(ref.key, ref if fits else None, own=inline))
    return items


class ContentReferences:
    """References to the contents of one request, for a GenerateStream."""

    def __init__(
        self,
        refs: Sequence[EmbeddingRef],
        placed: Sequence[Placed],
        encoder: AsyncEncoderClient | None,
    ) -> None:
        self._refs = {ref.key: ref for ref in refs}
        self._pictures = {item.ref.key: item.picture for item in placed if item.picture is not None}
        self._encoder = encoder
        self._resent: Counter[str] = Counter()

    async def ready(self, key: str) -> EmbeddingRef:
        return self._refs[key]

    async def again(self, key: str, reason: str) -> EmbeddingRef:
        """Raises EmbeddingUnavailable after too many losses, and for a reference whose
        picture the client does not have."""
        self._resent[key] += 1
        ref = self._refs.get(key)
        if ref is None or self._resent[key] > STREAM_POLICY.max_reencodes:
            raise EmbeddingUnavailable(
                "the worker lost the embedding again after it was sent again"
            )
        if ref.location.inline:
            return ref
        if key in self._pictures and self._encoder is not None:
            return await self._encoder.encode(self._pictures[key], lost=True)
        raise EmbeddingUnavailable(
            "the worker cannot reach the embedding; encode the picture again, or give the client "
            "the picture itself as content"
        )
