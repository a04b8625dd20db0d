"""The Python client against services on real sockets: encode, fetch, generate, errors."""

from __future__ import annotations

import asyncio
import io
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from opticnerve.client import (
    AsyncEncoderClient,
    AsyncLLMClient,
    EncoderClient,
    LLMClient,
    MultiMediaInfo,
    Sampling,
    Tensors,
)
from opticnerve.client.synchronous import _portals
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EmbeddingCorrupt,
    EmbeddingUnavailable,
    EngineFailure,
    InvalidMedia,
    InvalidRequest,
    NotFound,
    OpticNerveError,
    PayloadTooLarge,
    Unavailable,
)
from opticnerve.media.plan import Grid, Modality
from tests.encoders import FINGERPRINT, FakeBackend, Running, demo_layout, picture, running
from tests.fakes import FakeEncoder, FakeLLM, until

PAD = 632
IDS = [1, 2, *[PAD] * 9, 3]


def in_loop(scenario: Callable[[Path, AsyncExitStack], Awaitable[None]], tmp_path: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(200), AsyncExitStack() as stack:
            await scenario(tmp_path, stack)

    asyncio.run(run())


# ---- encoder


def test_encodes_any_form_of_a_picture_and_fetches(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        service = await stack.enter_async_context(running(tmp_path))
        client = await stack.enter_async_context(AsyncEncoderClient(service.server.address))
        data = picture(1)
        (tmp_path / "p.png").write_bytes(data)
        ref = await client.encode(data)
        assert ref.fingerprint == FINGERPRINT and ref.num_rows == 9 and not ref.hit
        assert ref.plan is not None and ref.plan.grid == Grid(1, 6, 6)
        again = await client.encode(tmp_path / "p.png")
        assert again.hit and again.key == ref.key
        tensors = await client.fetch(ref)
        rows = torch.from_dlpack(tensors["rows"])
        assert tuple(rows.shape) == (9, 8) and rows.dtype == torch.float32
        assert service.backend.batches == [1]

    in_loop(scenario, tmp_path)


def test_encoder_errors_are_typed(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        service = await stack.enter_async_context(running(tmp_path))
        address = service.server.address
        client = await stack.enter_async_context(AsyncEncoderClient(address, demo_layout()))
        with pytest.raises(InvalidMedia):
            await client.encode(b"no picture")
        ref = await client.encode(picture(1))
        service.encoder.results.store.delete(ref.key)
        with pytest.raises(NotFound):
            await client.fetch(ref)
        service.encoder.results.store.put(ref.key, {"rows": torch.zeros(9, 4)}, {})
        with pytest.raises(EmbeddingCorrupt):
            await client.fetch(ref)
        service.backend.hold()
        impatient = await stack.enter_async_context(AsyncEncoderClient(address, timeout_s=0.3))
        with pytest.raises(DeadlineExceeded):
            await impatient.encode(picture(2))
        service.backend.go()
        async with AsyncEncoderClient("127.0.0.1:1", timeout_s=60.0) as nowhere:
            with pytest.raises(Unavailable):
                await nowhere.encode(picture(1))

    in_loop(scenario, tmp_path)


def test_a_refusal_or_a_hit_is_heard_in_the_middle_of_a_large_upload(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        service = await stack.enter_async_context(running(tmp_path, max_item_bytes=2**24))
        client = await stack.enter_async_context(AsyncEncoderClient(service.server.address))
        noise = torch.randint(0, 255, (1500, 1500, 3), dtype=torch.uint8).numpy()
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
        await client.encode(buffer.getvalue())
        for _ in range(10):
            assert (await client.encode(buffer.getvalue())).hit
        service.encoder.settings = replace(service.encoder.settings, max_item_bytes=100)
        for _ in range(10):
            with pytest.raises(PayloadTooLarge):
                await client.encode(buffer.getvalue())

    in_loop(scenario, tmp_path)


def test_an_encoder_that_changed_is_asked_again(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        service = await stack.enter_async_context(running(tmp_path))
        client = await stack.enter_async_context(AsyncEncoderClient(service.server.address))
        client._fingerprint = "0" * 64  # As of the encoder that was here before.
        assert (await client.encode(picture(1))).fingerprint == FINGERPRINT

    in_loop(scenario, tmp_path)


# ---- LLM


async def llm_of(stack: AsyncExitStack, **options: Any) -> tuple[FakeLLM, AsyncLLMClient]:
    worker = await stack.enter_async_context(FakeLLM())
    client = AsyncLLMClient(worker.address, timeout_s=60.0, **options)
    return worker, await stack.enter_async_context(client)


def test_generates_from_a_reference(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        service = await stack.enter_async_context(running(tmp_path))
        encoder = await stack.enter_async_context(AsyncEncoderClient(service.server.address))
        worker, client = await llm_of(stack)
        ref = await encoder.encode(picture(1))
        answer = await client.generate(
            IDS, MultiMediaInfo({PAD: [ref]}), Sampling(max_tokens=8, n=2, logprobs=1)
        )
        assert [choice.token_ids for choice in answer.choices] == [(1, 2, 3), (1, 2, 3)]
        assert answer.choices[0].finish_reason == "stop" and answer.choices[0].stop_token_id == 3
        assert len(answer.choices[0].logprobs) == 3
        assert answer.usage.prompt_tokens == len(IDS) and answer.usage.embedding_tokens == 9
        (start,) = worker.starts
        assert list(start.token_ids) == IDS and start.items[0].ref.key == ref.key
        (span,) = start.spans
        assert (span.token_offset, span.num_tokens, span.grid_thw.h) == (2, 9, 6)

    in_loop(scenario, tmp_path)


def test_text_alone_needs_no_contents(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        worker, client = await llm_of(stack)
        answer = await client.generate([1, 2, 3], sampling=Sampling(max_tokens=2))
        assert answer.token_ids == (1, 2) and answer.choices[0].finish_reason == "length"
        assert not worker.starts[0].spans

    in_loop(scenario, tmp_path)


def test_an_answer_ends_by_default_where_the_workers_checkpoint_says(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        worker, client = await llm_of(stack)

        async def sent(sampling: Sampling | None) -> list[int]:
            await client.generate([1, 2, 3], sampling=sampling)
            return list(worker.starts[-1].sampling.eos_token_ids)

        assert await sent(None) == await sent(Sampling(max_tokens=5)) == [7, 9]
        assert await sent(Sampling(eos_token_ids=(5,))) == [5]
        assert await sent(Sampling(eos_token_ids=())) == []
        assert await sent(Sampling(ignore_eos=True)) == []
        worker.eos_token_ids = [8]  # Another worker at the same address.
        assert await sent(None) == [8]

    in_loop(scenario, tmp_path)


def test_contents_may_be_the_bare_mapping(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        worker, client = await llm_of(stack)
        rows = torch.randn(9, 8)
        for contents in ({PAD: rows}, {PAD: [rows]}, MultiMediaInfo({PAD: rows})):
            assert (await client.generate(IDS, contents)).token_ids == (1, 2, 3)
            assert worker.starts[-1].spans[0].num_tokens == 9
        with pytest.raises(InvalidRequest, match=r"\{id: \[content, \.\.\.\]\}, not as Tensor"):
            await client.generate(IDS, rows)  # type: ignore[arg-type]

    in_loop(scenario, tmp_path)


def test_own_tensors_go_inline_each_in_a_message(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        worker, client = await llm_of(stack)
        large = 3 * 2**20 // 2  # Two of 6 MiB each would not fit one message.
        own = [Tensors(torch.randn(9, large // 9, dtype=torch.bfloat16)) for _ in range(2)]
        ids = [1, *[PAD] * 9, 2, *[PAD] * 9]
        answer = await client.generate(ids, MultiMediaInfo({PAD: own}))
        assert answer.token_ids == (1, 2, 3)
        assert len(worker.refs) == 2 and all(ref.location.inline for ref in worker.refs)
        assert not any(item.HasField("ref") for item in worker.starts[0].items)

    in_loop(scenario, tmp_path)


def test_tensors_too_large_for_a_message_go_through_the_store(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        rows = torch.zeros(9, 2**19)
        worker, client = await llm_of(stack)
        with pytest.raises(PayloadTooLarge, match="store"):
            await client.generate(IDS, MultiMediaInfo({PAD: [rows]}))
        store = MemoryStore()
        stack.callback(store.close)
        worker, client = await llm_of(stack, store=store)
        await client.generate(IDS, MultiMediaInfo({PAD: [rows]}))
        (ref,) = worker.refs
        assert not ref.location.inline and store.get(ref.key) is not None

    in_loop(scenario, tmp_path)


def test_what_the_worker_lost_is_sent_again(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        encoder = await stack.enter_async_context(FakeEncoder())
        encodes = AsyncEncoderClient(encoder.address)
        await stack.enter_async_context(encodes)
        worker, client = await llm_of(stack, encoder=encodes)
        worker.asks_again = 2
        contents = MultiMediaInfo({PAD: [picture(1), torch.ones(2, 8)]})
        await client.generate([*IDS, PAD, PAD], contents)
        assert len(worker.refs) == 6
        assert [call.lost for call in encoder.calls] == [False, True, True]
        worker.asks_again = 3
        with pytest.raises(EmbeddingUnavailable):
            await client.generate([*IDS, PAD, PAD], contents)

    in_loop(scenario, tmp_path)


def test_a_lost_reference_without_its_picture_fails_with_advice(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        encoder = await stack.enter_async_context(FakeEncoder())
        encodes = await stack.enter_async_context(AsyncEncoderClient(encoder.address))
        worker, client = await llm_of(stack)
        worker.asks_again = 1
        ref = await encodes.encode(picture(1))
        with pytest.raises(EmbeddingUnavailable, match="encode the picture again"):
            await client.generate(IDS, MultiMediaInfo({PAD: [ref]}))
        with pytest.raises(InvalidRequest, match="need an encoder"):
            await client.generate(IDS, MultiMediaInfo({PAD: [picture(1)]}))

    in_loop(scenario, tmp_path)


def test_leaving_a_stream_early_aborts_the_generation(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        worker, client = await llm_of(stack)
        hold, held = asyncio.Event(), asyncio.Event()

        async def step(worker: FakeLLM, index: int) -> None:
            if index == 1:
                held.set()
                await hold.wait()

        worker.step = step
        stream = client.stream([1, 2])
        assert (await anext(stream)).token_ids == (1,)
        await stream.aclose()
        await asyncio.wait_for(worker.cancelled.wait(), 60)
        await until(lambda: worker.running == 0)
        held.clear()
        worker.cancelled.clear()
        whole = asyncio.create_task(client.generate([1, 2]))
        await asyncio.wait_for(held.wait(), 60)  # Between tokens: a cancel is seen by the worker.
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
        await asyncio.wait_for(worker.cancelled.wait(), 60)

    in_loop(scenario, tmp_path)


def test_llm_errors_are_typed(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        worker, client = await llm_of(stack)
        errors: list[OpticNerveError] = [
            ContextLengthExceeded("too long", param="token_ids"),
            EngineFailure("the step failed"),
        ]
        for error in errors:

            async def step(worker: FakeLLM, index: int, error: OpticNerveError = error) -> None:
                raise error

            worker.step = step
            with pytest.raises(type(error), match=error.message):
                await client.generate([1])

        seen = []

        async def die(worker: FakeLLM, index: int) -> None:
            if index == 1:
                await until(lambda: seen)  # What is on its way is lost with the connection.
                asyncio.get_running_loop().create_task(worker.die())
                await asyncio.Event().wait()

        worker.step = die
        with pytest.raises(OpticNerveError) as caught:
            async for delta in client.stream([1]):
                seen.append(delta.token_ids)
        assert seen == [(1,)] and caught.value.http_status in (499, 503)

    in_loop(scenario, tmp_path)


# ---- synchronous


class Background:
    """An encoder and an LLM worker on a loop of their own thread."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.backend = FakeBackend()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.service: Running
        self.worker: FakeLLM

    async def _serve(self) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        async with (
            running(self.tmp_path, backend=self.backend) as self.service,
            FakeLLM() as self.worker,
        ):
            self.ready.set()
            await self.stop.wait()


@contextmanager
def background(tmp_path: Path) -> Iterator[Background]:
    services = Background(tmp_path)
    services.thread.start()
    try:
        assert services.ready.wait(60)
        yield services
    finally:
        services.loop.call_soon_threadsafe(services.stop.set)
        services.thread.join(60)


def test_synchronous_clients(tmp_path: Path) -> None:
    with background(tmp_path) as services:
        address = services.service.server.address
        with (
            EncoderClient(address) as encoder,
            LLMClient(services.worker.address, encoder=encoder) as llm,
        ):
            assert encoder.describe().fingerprint == FINGERPRINT
            assert llm.describe().vocab_size == 640
            assert encoder.layout().item_token_ids[Modality.IMAGE] == PAD
            ref = encoder.encode(picture(1))
            assert tuple(encoder.fetch(ref)["rows"].shape) == (9, 8)
            with pytest.raises(InvalidMedia):
                encoder.encode(b"no picture")
            contents = MultiMediaInfo({PAD: [picture(1)]})
            assert llm.generate(IDS, contents).token_ids == (1, 2, 3)
            assert [d.token_ids for d in llm.stream(IDS, contents)] == [(1,), (2,), (3,)]
            with pytest.raises(InvalidRequest, match="9 rows"):
                llm.generate([PAD], contents)
            for delta in llm.stream(IDS, contents):
                assert delta.token_ids == (1,)
                break
        encoder.close()  # Twice is once.
    assert _portals._leases == 0 and _portals._portal_cm is None
    assert not [each for each in threading.enumerate() if "portal" in each.name]


def test_an_interrupt_of_a_waiting_thread_cancels_the_call(tmp_path: Path) -> None:
    with background(tmp_path) as services, LLMClient(services.worker.address) as llm:
        main = threading.main_thread().ident
        assert main is not None

        async def step(worker: FakeLLM, index: int) -> None:
            if index == 1:
                signal.pthread_kill(main, signal.SIGINT)
                await asyncio.Event().wait()

        services.worker.step = step
        with pytest.raises(KeyboardInterrupt):
            llm.generate([1, 2])
        cancelled = services.worker.cancelled.wait()
        asyncio.run_coroutine_threadsafe(cancelled, services.loop).result(60)
        services.worker.step = None
        assert llm.generate([1, 2]).token_ids == (1, 2, 3)


class Refusing(FakeLLM):
    """Refuses every request at once, while its caller still writes."""

    async def Generate(self, request_iterator: Any, context: Any) -> Any:
        await anext(request_iterator)
        raise ContextLengthExceeded("too long", param="token_ids")
        yield


def test_a_refusal_is_heard_while_the_client_still_writes(tmp_path: Path) -> None:
    async def scenario(tmp_path: Path, stack: AsyncExitStack) -> None:
        worker = await stack.enter_async_context(Refusing())
        client = await stack.enter_async_context(AsyncLLMClient(worker.address))
        ids = [PAD] * 18
        own = [Tensors(torch.randn(9, 2**16)) for _ in range(2)]
        for _ in range(20):
            with pytest.raises(ContextLengthExceeded, match="too long"):
                await client.generate(ids, MultiMediaInfo({PAD: own}))

    in_loop(scenario, tmp_path)
