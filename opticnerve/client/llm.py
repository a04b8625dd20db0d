"""The asynchronous client of one LLM worker."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc

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
from opticnerve.errors import (
    EmbeddingUnavailable,
    InvalidRequest,
    OpticNerveError,
    PayloadTooLarge,
    Unavailable,
)
from opticnerve.generation import messages as llm_messages
from opticnerve.generation.checks import read_token_ids
from opticnerve.generation.values import Delta, Generation, PositionLogprobs, Sampling, Usage, join
from opticnerve.pb import llm_pb2, llm_pb2_grpc
from opticnerve.rpc import convert
from opticnerve.rpc.channel import open_channel
from opticnerve.rpc.errors import from_rpc
from opticnerve.rpc.token import load_token

MAX_INLINE_BYTES = 7 * 2**20  # A message holds 8 MiB.
START_INLINE_BYTES = 2**20  # Of tensors in the first message.
MAX_RESENDS = 2  # Of one key.
CORE_ERROR = "Internal error from Core"
PATIENCE_S = 0.25

Contents: TypeAlias = MultiMediaInfo | Mapping[int, Any]

Call = Any  # grpc.aio.StreamStreamCall[GenerateIn, GenerateOut]; generic in its stubs alone.


class CallEnded(Unavailable):
    """A write met the end of its call, and gRPC then hides the status that the worker sent."""


class AsyncLLMClient:
    """Token ids and contents to token ids, by one LLM worker at ``address`` (host:port).

    ``encoder`` is used for contents that are pictures, and to encode them again when the worker
    has lost their rows. ``store`` (from ``opticnerve.embeddings.open.open_store``) carries the
    caller's own tensors when they are too large for a message; the worker must reach the same
    one, which is opened with ``seal=Seal.load(FILE)`` (``opticnerve.embeddings.seal``) where it has
    a ``--store-key-file``. Both are the caller's to close. ``rpc_token_file`` is the worker's own.
    Errors are those of
    ``opticnerve.errors``.
    """

    def __init__(
        self,
        address: str,
        *,
        encoder: AsyncEncoderClient | None = None,
        store: Store | None = None,
        timeout_s: float = 600.0,
        rpc_token_file: str | Path | None = None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._encoder = encoder
        self._store = store
        self._channel = open_channel(address, load_token(rpc_token_file))
        self._stub = llm_pb2_grpc.LLMStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every generation under way."""
        await self._channel.close()

    async def describe(self, timeout_s: float | None = None) -> llm_pb2.DescribeLLMResponse:
        """What the worker is, what it accepts, and how busy it is."""
        request, patience_s = llm_pb2.DescribeLLMRequest(), timeout_s or self.timeout_s
        try:
            return await self._stub.Describe(request, timeout=patience_s)
        except grpc.RpcError as error:
            raise from_rpc(error) from error

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
        run = await self._open(token_ids, contents, sampling, request_id, timeout_s)
        try:
            deltas = [delta async for delta in run.deltas()]
        finally:
            run.cancel()
        return join(deltas, run.usage, run.prompt_logprobs)

    async def stream(
        self,
        token_ids: Sequence[int],
        contents: Contents | None = None,
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """New tokens as they come. Closing the iterator early aborts the generation.

        ``token_ids`` has a run of placeholders for every content, as many as it has rows.
        ``contents`` may be the mapping that a ``MultiMediaInfo`` is made of. The answer ends with
        ``sampling.eos_token_ids``, by default the checkpoint's, or after ``max_tokens``.
        Raises InvalidRequest where they do not fit, and what ``llm.proto`` says.
        """
        run = await self._open(token_ids, contents, sampling, request_id, timeout_s)
        try:
            async with contextlib.aclosing(run.deltas()) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            run.cancel()

    async def _open(
        self,
        token_ids: Sequence[int],
        contents: Contents | None,
        sampling: Sampling | None,
        request_id: str,
        timeout_s: float | None,
    ) -> Run:
        ids = read_token_ids("token_ids", token_ids)
        found = contents if isinstance(contents, MultiMediaInfo) else MultiMediaInfo(contents)
        resolved, placed = await asyncio.gather(
            self._resolve(sampling, timeout_s),
            asyncio.gather(*(self._place(*content) for content in found)),
        )
        refs, spans = lay_out(ids, placed)
        pictures = {item.ref.key: item for item in placed if item.picture is not None}
        start = llm_pb2.Start(
            request_id=request_id or f"client-{uuid.uuid4().hex[:16]}",
            token_ids=ids,
            spans=[convert.span_to_pb(span) for span in spans],
            items=items_of(refs),
            sampling=llm_messages.sampling_to_pb(resolved),
        )
        first = llm_pb2.GenerateIn(start=start)
        for patience_s in (0.0, PATIENCE_S):
            call = self._stub.Generate(timeout=timeout_s or self.timeout_s)
            run = Run(call, {ref.key: ref for ref in refs}, pictures, self._encoder)
            try:
                await run.start(first, patience_s)
                return run
            except CallEnded as error:
                run.cancel()
                masked = error
            except BaseException:
                run.cancel()
                raise
        raise masked

    async def _resolve(self, sampling: Sampling | None, timeout_s: float | None) -> Sampling:
        """Every field as it is sent. The ids that end an answer are asked for each time: another
        worker may stand at this address by now."""
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


def items_of(refs: Sequence[EmbeddingRef]) -> list[llm_pb2.Item]:
    """The items of Start, with their references, except those with bytes of their own that would
    make it large: these it only names, and each follows in a message of its own."""
    items, room = [], START_INLINE_BYTES
    for ref in refs:
        own = bool(ref.location.inline)
        room -= len(ref.location.inline)
        fits = room >= 0 or not own
        items.append(llm_messages.item(ref.key, ref if fits else None, own=own))
    return items


class Run:
    """One generation under way: yields deltas, answers what the worker asks for."""

    def __init__(
        self,
        call: Call,
        refs: dict[str, EmbeddingRef],
        pictures: dict[str, Placed],
        encoder: AsyncEncoderClient | None,
    ) -> None:
        self.usage = Usage()
        self.prompt_logprobs: tuple[PositionLogprobs, ...] = ()
        self._call = call
        self._refs = refs
        self._pictures = pictures
        self._encoder = encoder
        self._resent: Counter[str] = Counter()

    async def start(self, first: llm_pb2.GenerateIn, patience_s: float) -> None:
        """Sends the request, then the tensors that did not fit its first message; gives the
        worker ``patience_s`` to refuse it in between. Raises CallEnded: try with patience."""
        await self._write(first)
        sent = {item.key for item in first.start.items if item.HasField("ref")}
        late = [ref for key, ref in self._refs.items() if key not in sent]
        if late and patience_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._call.code(), patience_s)  # Known once it has ended.
        for ref in late:
            await self._write(llm_messages.ready(ref))

    def cancel(self) -> None:
        """Aborts what still runs; nothing when it has ended."""
        self._call.cancel()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Until the worker is done. Raises the typed error of a call that ends otherwise."""
        done = False
        while (message := await self._read()) is not None:
            if message.HasField("embedding_needed"):
                await self._answer(message.embedding_needed.keys)
            if message.HasField("prompt_logprobs"):
                positions = message.prompt_logprobs.positions
                self.prompt_logprobs = llm_messages.positions_from_pb(positions)
            for delta in message.deltas:
                yield llm_messages.delta_from_pb(delta)
            if message.HasField("done"):
                self.usage = llm_messages.done_from_pb(message.done).usage
                done = True
        if not done:
            raise Unavailable("the LLM worker ended the stream before the generation was done")

    async def _read(self) -> llm_pb2.GenerateOut | None:
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        if isinstance(message, llm_pb2.GenerateOut):
            return message
        if await self._call.code() is not grpc.StatusCode.OK:
            raise await self._outcome()
        return None

    async def _answer(self, keys: Sequence[str]) -> None:
        """Sends rows again, or says why they will not come, which ends the generation."""
        for key in keys:
            try:
                ref = await self._find_again(key)
            except OpticNerveError as error:
                await self._write(llm_messages.failed(key, error))
                return
            await self._write(llm_messages.ready(ref))

    async def _write(self, message: llm_pb2.GenerateIn) -> None:
        """Raises the typed error of a call that has ended meanwhile."""
        try:
            await self._call.write(message)
        except asyncio.InvalidStateError as error:
            raise await self._outcome() from error
        except grpc.RpcError as error:
            if error.details() == CORE_ERROR:
                raise CallEnded("the LLM worker ended the call") from error
            raise from_rpc(error) from error

    async def _outcome(self) -> OpticNerveError:
        """The typed error that ended the call."""
        metadata = await self._call.trailing_metadata()
        status = await self._call.code(), metadata, metadata, await self._call.details()
        return from_rpc(grpc.aio.AioRpcError(*status))

    async def _find_again(self, key: str) -> EmbeddingRef:
        self._resent[key] += 1
        ref = self._refs.get(key)
        if ref is None or self._resent[key] > MAX_RESENDS:
            raise EmbeddingUnavailable(
                "the worker lost the embedding again after it was sent again"
            )
        if ref.location.inline:
            return ref
        placed = self._pictures.get(key)
        if placed is not None and placed.picture is not None and self._encoder is not None:
            return await self._encoder.encode(placed.picture, lost=True)
        raise EmbeddingUnavailable(
            "the worker cannot reach the embedding; encode the picture again, or give the client "
            "the picture itself as content"
        )
