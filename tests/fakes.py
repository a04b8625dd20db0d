"""Small stand-ins for the services' neighbours, speaking the real protos.

``FakeEncoder`` and ``FakeLLM`` are scripted servers on real sockets: they can hold a call until
told to go on, answer with a typed error, and die in the middle of a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from opticnerve.pb import embedding_pb2, encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from opticnerve.rpc import errors as rpc_errors
from opticnerve.rpc.calls import Calls
from opticnerve.rpc.server import SERVER_OPTIONS
from tests.system import free_port

PAIR_ID = "ab" * 32


class FakeServer:
    """A gRPC server on a free port of this machine; start again on the same port after death."""

    def __init__(self) -> None:
        self.port = 0
        self.server: grpc.aio.Server | None = None
        self.health = health_aio.HealthServicer()
        self.store: embedding_pb2.StoreState | None = None
        self.instance_id = ""  # What it says of its process; nothing, as earlier releases do.

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def register(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def start(self, *, serving: bool = True) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[Calls()])
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.register(self.server)
        self.port = self._bind(self.server)
        await self.set_serving(serving)
        await self.server.start()

    def _bind(self, server: grpc.aio.Server) -> int:
        """A port that nobody else is given while the server is dead; then the same again."""
        if self.port:
            return server.add_insecure_port(self.address)
        for _ in range(20):
            with contextlib.suppress(RuntimeError):  # Somebody was faster.
                return server.add_insecure_port(f"127.0.0.1:{free_port()}")
        raise RuntimeError("no free port")

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in {"", self.instance_id}:
            await self.health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def die(self) -> None:
        """Closes every connection at once; calls under way break as when a process is killed."""
        server, self.server = self.server, None
        if server is not None:
            await server.stop(None)

    async def __aenter__(self) -> Any:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.die()


class FakeEncoder(FakeServer, encoder_pb2_grpc.EncoderServicer):
    """Encodes nothing: the reference names the key. ``script`` runs before each answer and may
    raise an OpticNerveError, wait, or kill the server."""

    def __init__(self, fingerprint: str = "enc-1", pair_id: str = PAIR_ID) -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.pair_id = pair_id
        self.calls: list[encoder_pb2.EncodeHeader] = []
        self.received: list[bytes] = []
        self.started = asyncio.Event()  # A call has brought all its bytes.
        self.cancelled = asyncio.Event()  # A call was cancelled by its caller.
        self.script: Callable[[FakeEncoder], Awaitable[None]] | None = None
        self.hit = False
        self.advertise = ""  # Where it says that it is, if that is not the truth.
        self.patches_per_s = 0.0  # What it says of its throughput.
        self.max_batch_patches = 4096
        self.running = 0
        self.most_running = 0

    def register(self, server: grpc.aio.Server) -> None:
        encoder_pb2_grpc.add_EncoderServicer_to_server(self, server)

    async def Encode(
        self, request_iterator: AsyncIterator[encoder_pb2.EncodeRequest], context: Any
    ) -> encoder_pb2.EncodeResponse:
        header, data = None, bytearray()
        async for message in request_iterator:
            if header is None:
                header = message.header
            data += message.data
        assert header is not None and header.num_bytes == len(data)
        self.calls.append(header)
        self.received.append(bytes(data))
        self.started.set()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.script is not None:
                await self.script(self)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1
        return encoder_pb2.EncodeResponse(
            ref=self.ref(header),
            timings=encoder_pb2.EncodeTimings(
                queue_ms=1, preprocess_ms=2, encode_ms=3, put_ms=4, hit=self.hit
            ),
        )

    def ref(self, header: encoder_pb2.EncodeHeader) -> embedding_pb2.EmbeddingRef:
        rows = header.plan.num_tokens
        return embedding_pb2.EmbeddingRef(
            key=header.key,
            fingerprint=self.fingerprint,
            tensors=[
                embedding_pb2.TensorSpec(
                    name="rows", dtype=embedding_pb2.DTYPE_BF16, shape=[rows, 8]
                )
            ],
            num_rows=rows,
            location=embedding_pb2.Location(
                redis=bool(self.store and self.store.kind == "redis"),
                fetch_address=self.advertise or self.address,
            ),
        )

    async def Describe(self, request: Any, context: Any) -> encoder_pb2.DescribeEncoderResponse:
        return encoder_pb2.DescribeEncoderResponse(
            fingerprint=self.fingerprint,
            pair_id=self.pair_id,
            family="qwen2_vl",
            backend="torch",
            device="cpu",
            hidden_size=192,
            limits=encoder_pb2.EncoderLimits(
                max_batch_patches=self.max_batch_patches, max_item_patches=4096
            ),
            load=encoder_pb2.EncoderLoad(patches_per_s=self.patches_per_s),
            store=self.store,
            instance_id=self.instance_id,
            fetch_address=self.advertise or self.address,
        )


class FakeLLM(FakeServer, llm_pb2_grpc.LLMServicer):
    """Writes ``tokens`` after every item's reference has come; ``step`` runs before each token
    and may wait, raise, or kill the server. One instance tells what it was asked."""

    def __init__(self, tokens: list[int] | None = None, pair_id: str = PAIR_ID) -> None:
        super().__init__()
        self.tokens = tokens if tokens is not None else [1, 2, 3]
        self.others: dict[int, list[int]] = {}  # Choices that write other tokens than ``tokens``.
        self.pair_id = pair_id
        self.fingerprint = "llm-" + hashlib.sha256(pair_id.encode()).hexdigest()[:8]
        self.starts: list[llm_pb2.Start] = []
        self.refs: list[embedding_pb2.EmbeddingRef] = []
        self.failures: list[llm_pb2.EmbeddingFailed] = []
        self.step: Callable[[FakeLLM, int], Awaitable[None]] | None = None
        self.asks_again = 0  # How often EmbeddingNeeded is sent for every item.
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.running = 0
        self.max_model_len = 4096
        self.cached_tokens = 0  # Of every prompt.
        self.prefix_cache_tokens = 1024
        self.eos_token_ids = [7, 9]

    def register(self, server: grpc.aio.Server) -> None:
        llm_pb2_grpc.add_LLMServicer_to_server(self, server)

    async def Generate(
        self, request_iterator: AsyncIterator[llm_pb2.GenerateIn], context: Any
    ) -> AsyncIterator[llm_pb2.GenerateOut]:
        first = await anext(request_iterator)
        start = first.start
        self.starts.append(start)
        self.started.set()
        self.running += 1
        try:
            async for needed in self._gather(start, request_iterator):
                yield needed
            async for out in self._write(start):
                yield out
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def _gather(
        self, start: llm_pb2.Start, inbox: AsyncIterator[llm_pb2.GenerateIn]
    ) -> AsyncIterator[llm_pb2.GenerateOut]:
        """Waits for a reference to every item; asks ``asks_again`` times for another."""
        here = {item.key for item in start.items if item.HasField("ref")}
        self.refs += [item.ref for item in start.items if item.HasField("ref")]
        wanted = {item.key for item in start.items}
        for round_ in range(self.asks_again + 1):
            while not wanted <= here:
                here.add(await self._next_ref(inbox))
            if round_ < self.asks_again:
                here.clear()
                yield llm_pb2.GenerateOut(
                    embedding_needed=llm_pb2.EmbeddingNeeded(
                        keys=sorted(wanted), reason=llm_pb2.NEEDED_REASON_EVICTED
                    )
                )

    async def _next_ref(self, inbox: AsyncIterator[llm_pb2.GenerateIn]) -> str:
        message = await anext(inbox)
        if message.HasField("embedding_failed"):
            self.failures.append(message.embedding_failed)
            raise rpc_errors.from_detail(message.embedding_failed.detail)
        self.refs.append(message.embedding_ready.ref)
        return message.embedding_ready.ref.key

    async def _write(self, start: llm_pb2.Start) -> AsyncIterator[llm_pb2.GenerateOut]:
        n = max(1, start.sampling.n)
        limit = start.sampling.max_tokens
        scripts = {choice: self.others.get(choice, self.tokens)[:limit] for choice in range(n)}
        sent = {output.choice: len(output.output_ids) for output in start.outputs}
        ended = {output.choice for output in start.outputs if output.finished}
        todo = {choice: ids for choice, ids in scripts.items() if choice not in ended}
        first = min((sent.get(choice, 0) for choice in todo), default=0)
        yield llm_pb2.GenerateOut(prefilled=llm_pb2.Prefilled(cached_tokens=self.cached_tokens))
        for piece in self._prompt_logprobs(start):
            yield llm_pb2.GenerateOut(prompt_logprobs=piece)
            if self.step is not None:
                await self.step(self, -1)
        for index in range(first, max(map(len, todo.values()), default=0)):
            if self.step is not None:
                await self.step(self, index)
            yield llm_pb2.GenerateOut(
                deltas=[
                    self._delta(start, choice, index, ids)
                    for choice, ids in todo.items()
                    if sent.get(choice, 0) <= index < len(ids)
                ]
            )
        yield llm_pb2.GenerateOut(
            done=llm_pb2.Done(
                usage=llm_pb2.Usage(
                    prompt_tokens=len(start.token_ids),
                    completion_tokens=sum(map(len, scripts.values())),
                    cached_tokens=self.cached_tokens,
                    embedding_tokens=sum(span.num_tokens for span in start.spans),
                ),
                timings=llm_pb2.GenerateTimings(
                    queue_ms=1, prefill_ms=2, decode_ms=3, preemptions=4
                ),
            )
        )

    def _delta(
        self, start: llm_pb2.Start, choice: int, index: int, ids: list[int]
    ) -> llm_pb2.TokenDelta:
        """The token at ``index`` of a choice that is to have ``ids``."""
        token, last = ids[index], index == len(ids) - 1
        finish = llm_pb2.FINISH_REASON_UNSPECIFIED
        if last:
            whole = len(ids) == len(self.others.get(choice, self.tokens))
            finish = llm_pb2.FINISH_REASON_STOP if whole else llm_pb2.FINISH_REASON_LENGTH
        return llm_pb2.TokenDelta(
            choice=choice,
            first_index=index,
            token_ids=[token],
            logprobs=self._logprobs(start, token),
            finish_reason=finish,
            stop_token_id=token if finish == llm_pb2.FINISH_REASON_STOP else None,
        )

    def _logprobs(self, start: llm_pb2.Start, token: int) -> list[llm_pb2.PositionLogprobs]:
        if not start.sampling.HasField("logprobs"):
            return []
        return [self._position(token, start.sampling.logprobs)]

    def _prompt_logprobs(self, start: llm_pb2.Start) -> list[llm_pb2.PromptLogprobs]:
        """Pieces of three tokens."""
        if not start.sampling.HasField("prompt_logprobs"):
            return []
        pictures = {
            place
            for span in start.spans
            for place in range(span.token_offset, span.token_offset + span.num_tokens)
        }
        positions = [
            llm_pb2.PositionLogprobs()
            if place == 0 or place in pictures
            else self._position(token, start.sampling.prompt_logprobs)
            for place, token in enumerate(start.token_ids)
        ]
        places = range(0, len(positions), 3)
        return [llm_pb2.PromptLogprobs(positions=positions[place : place + 3]) for place in places]

    def _position(self, token: int, count: int) -> llm_pb2.PositionLogprobs:
        best = [
            llm_pb2.TokenLogprob(token_id=(token + i) % 600, logprob=-0.5 - i, rank=i + 1)
            for i in range(count)
        ]
        sampled = llm_pb2.TokenLogprob(token_id=token, logprob=-0.5, rank=1)
        return llm_pb2.PositionLogprobs(sampled=sampled, top=best)

    async def Describe(self, request: Any, context: Any) -> llm_pb2.DescribeLLMResponse:
        return llm_pb2.DescribeLLMResponse(
            fingerprint=self.fingerprint,
            pair_id=self.pair_id,
            family="qwen2_vl",
            attention="sdpa",
            device="cpu",
            hidden_size=192,
            vocab_size=640,
            limits=llm_pb2.LLMLimits(
                max_model_len=self.max_model_len,
                max_logprobs=20,
                num_kv_blocks=64,
                prefix_cache_tokens=self.prefix_cache_tokens,
            ),
            load=llm_pb2.LLMLoad(running=self.running, free_kv_blocks=64),
            store=self.store,
            eos_token_ids=self.eos_token_ids,
            instance_id=self.instance_id,
        )


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Waits for a condition that nothing announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
