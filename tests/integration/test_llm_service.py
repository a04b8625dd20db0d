"""The LLM service behind its wire: real gRPC, the demo checkpoint, rows that go missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from llm_service.__main__ import main
from opticnerve.embeddings.ledger import Ledger
from opticnerve.embeddings.ref import Location
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import (
    ContextLengthExceeded,
    EmbeddingCorrupt,
    EmbeddingEvicted,
    EmbeddingNotFound,
    InvalidMedia,
    InvalidRequest,
    OpticNerveError,
    Overloaded,
    StartupError,
    Unavailable,
    UnsupportedFeature,
)
from opticnerve.media.plan import Grid, Span
from opticnerve.pb import embedding_pb2, encoder_pb2, encoder_pb2_grpc
from opticnerve.pb import llm_pb2 as pb
from opticnerve.rpc import convert
from opticnerve.rpc.channel import chunks, is_serving, open_channel
from tests.checkpoints import EOS
from tests.llms import (
    WAIT_S,
    Answer,
    Demo,
    Picture,
    Prompt,
    Worker,
    failed,
    next_message,
    read,
    ready,
    running,
)

pytestmark = pytest.mark.slow
TOKENS = 12

Body = Callable[[Worker], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def demo() -> Demo:
    torch.set_num_threads(1)
    return Demo()


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., None]:
    """``serve(body, **fields of LLMConfig)``: runs ``body(worker)`` and checks that the engine
    holds nothing at its end."""

    def run(body: Body, **fields: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(250), running(tmp_path, **fields) as worker:
                await body(worker)

        asyncio.run(main())

    return run


# ---- answers


def test_text_and_pictures_equal_the_unsplit_model(demo: Demo, serve: Callable[..., None]) -> None:
    one, two = demo.picture(1), demo.picture(2, (140, 84))
    prompts = [
        demo.prompt(30, seed=1),
        demo.prompt(1, seed=2),
        demo.prompt(8, one, 9, seed=3),
        demo.prompt(two, 5, one, 6, seed=4),
    ]

    async def body(worker: Worker) -> None:
        refs = {picture.key: worker.put(picture) for picture in (one, two)}

        async def ask(prompt: Prompt) -> Answer:
            return await worker.generate(prompt.start([refs[p.key] for p in prompt.pictures]))

        for answers in (
            [await ask(prompt) for prompt in prompts],
            await asyncio.gather(*map(ask, prompts)),
        ):
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens[0] == demo.reference(prompt, TOKENS)
                assert answer.done is not None
                usage = answer.done.usage
                assert usage.prompt_tokens == len(prompt.token_ids)
                assert usage.completion_tokens == len(answer.tokens[0])
                assert usage.embedding_tokens == sum(p.plan.num_tokens for p in prompt.pictures)
                assert answer.needed == []
                last = answer.deltas[-1].finish_reason
                assert last in (pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP)

    serve(body)


def test_the_engines_thread_touches_no_file_and_no_store(
    demo: Demo, serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is opened, mapped, summed, pinned or deleted for a picture: other threads do it."""
    prompt = demo.prompt(4, demo.picture(5), 3)
    calls: list[tuple[str, str]] = []  # (name, thread)

    def record(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, threading.current_thread().name))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    for name in ("get", "contains", "lease", "leasable_bytes", "delete"):
        record(ShmStore, name)
    for name in ("pin", "unpin", "unpinned_bytes"):
        record(Ledger, name)

    async def body(worker: Worker) -> None:
        ref = worker.put(prompt.pictures[0])
        with file_events(str(worker.store.directory)) as touched:
            for _ in range(2):
                answer = await worker.generate(prompt.start([ref]))
                assert answer.tokens[0] == demo.reference(prompt, TOKENS)
            await worker.idle()
        assert {"open", "mmap.__new__"} <= {event for event, _ in touched}
        assert "engine" not in {thread for _, thread in touched}
        assert {"get", "pin"} <= {name for name, _ in calls}
        assert [name for name, thread in calls if thread == "engine"] == []

    serve(body, no_prefix_caching=True)


_watching: list[Callable[[str, tuple[Any, ...]], None]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    for watch in _watching:
        watch(event, args)


@contextlib.contextmanager
def file_events(directory: str) -> Iterator[list[tuple[str, str]]]:
    """(event, thread) of what happens to files in ``directory``, and of every mapping."""
    touched: list[tuple[str, str]] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        inside = any(str(arg).startswith(directory) for arg in args)
        if event == "mmap.__new__" or (inside and event.split(".")[0] in ("open", "os", "shutil")):
            touched.append((event, threading.current_thread().name))

    if _audit not in _hooked:
        sys.addaudithook(_audit)  # For the life of the process.
        _hooked.append(_audit)
    _watching.append(watch)
    try:
        yield touched
    finally:
        _watching.remove(watch)


_hooked: list[Callable[[str, tuple[Any, ...]], None]] = []


def test_the_stages_are_timed(demo: Demo, serve: Callable[..., None]) -> None:
    prompt = demo.prompt(4, demo.picture(5), 3)

    async def body(worker: Worker) -> None:
        first = await worker.generate(prompt.start([worker.put(prompt.pictures[0])]))
        assert first.done is not None
        assert first.done.timings.get_ms > 0
        assert first.done.timings.prefill_ms > 0
        assert first.done.timings.decode_ms > 0
        again = await worker.generate(prompt.start([prompt.pictures[0].ref()]))
        assert again.done is not None
        assert again.tokens == first.tokens

    serve(body)


def test_other_pictures_give_other_answers(demo: Demo, serve: Callable[..., None]) -> None:
    """One prompt, two pictures of as many placeholders, and a warm prefix cache."""
    pictures = [demo.picture(seed) for seed in (11, 12)]
    prompts = [demo.prompt(10, picture, 20, seed=9) for picture in pictures]
    assert prompts[0].token_ids == prompts[1].token_ids

    async def body(worker: Worker) -> None:
        for prompt in (*prompts, *prompts):
            answer = await worker.generate(prompt.start([worker.put(prompt.pictures[0])]))
            assert answer.tokens[0] == demo.reference(prompt, TOKENS)

    serve(body)


def test_logprobs_choices_and_seeds(demo: Demo, serve: Callable[..., None]) -> None:
    prompt = demo.prompt(6, demo.picture(6), 7, seed=5)
    sampling = {"logprobs": 3, "prompt_logprobs": 2, "temperature": 1.0, "seed": 7, "n": 3}

    async def body(worker: Worker) -> None:
        ref = worker.put(prompt.pictures[0])
        answer, again = [
            await worker.generate(prompt.start([ref], sampling=sampling)) for _ in range(2)
        ]
        assert answer.tokens == again.tokens
        assert len(answer.tokens) == 3
        other = await worker.generate(prompt.start([ref], sampling={**sampling, "seed": 8}))
        assert other.tokens != answer.tokens
        assert answer.done is not None
        assert answer.done.usage.completion_tokens == sum(map(len, answer.tokens.values()))
        for choice, tokens in answer.tokens.items():
            check_logprobs(demo.logprobs(prompt, tokens), prompt, answer, choice)
        check_prompt_logprobs(demo.logprobs(prompt), prompt, answer)

    serve(body)


def check_logprobs(expected: torch.Tensor, prompt: Prompt, answer: Answer, choice: int) -> None:
    said = [
        position for delta in answer.deltas if delta.choice == choice for position in delta.logprobs
    ]
    assert len(said) == len(answer.tokens[choice])
    for index, position in enumerate(said):
        row = expected[len(prompt.token_ids) - 1 + index]
        token = answer.tokens[choice][index]
        assert position.sampled.token_id == token
        assert position.sampled.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert position.sampled.rank == 1 + int((row > row[token]).sum())
        best = row.topk(3).values
        assert [top.logprob for top in position.top] == pytest.approx(best.tolist(), abs=1e-4)


def check_prompt_logprobs(expected: torch.Tensor, prompt: Prompt, answer: Answer) -> None:
    assert len(answer.prompt_logprobs) == len(prompt.token_ids)
    span = prompt.spans[0]
    for index, position in enumerate(answer.prompt_logprobs):
        inside = span.token_offset <= index < span.token_offset + span.num_tokens
        assert position.HasField("sampled") != (index == 0 or inside)
        if position.HasField("sampled"):
            token = prompt.token_ids[index]
            want = expected[index - 1, token].item()
            assert position.sampled.logprob == pytest.approx(want, abs=1e-4)


def test_output_ids_continue_with_the_same_tail(demo: Demo, serve: Callable[..., None]) -> None:
    prompt = demo.prompt(9, demo.picture(7), 4, seed=6)
    sampling = {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5, "max_tokens": TOKENS}

    async def body(worker: Worker) -> None:
        ref = worker.put(prompt.pictures[0])
        whole = (await worker.generate(prompt.start([ref], sampling=sampling))).tokens[0]
        for cut in (1, len(whole) // 2, len(whole) - 1):
            sent = pb.ChoiceOutput(output_ids=whole[:cut])
            start = prompt.start([ref], sampling=sampling, outputs=[sent])
            answer = await worker.generate(start)
            assert answer.tokens[0] == whole[cut:]
            assert answer.deltas[0].first_index == cut
            assert answer.done is not None
            assert answer.done.usage.completion_tokens == len(whole)

    serve(body)


def test_every_choice_continues_with_outputs_of_its_own(
    demo: Demo, serve: Callable[..., None]
) -> None:
    prompt = demo.prompt(9, demo.picture(7), 4, seed=6)
    sampling = {
        "temperature": 1.3,
        "seed": 5,
        "n": 3,
        "logprobs": 1,
        "frequency_penalty": 0.5,
        "max_tokens": 24,
        "ignore_eos": True,
    }

    async def body(worker: Worker) -> None:
        ref = worker.put(prompt.pictures[0])
        whole = await worker.generate(prompt.start([ref], sampling=sampling))
        ids = whole.tokens
        assert len({tuple(each) for each in ids.values()}) == 3
        sent = [
            pb.ChoiceOutput(choice=2, output_ids=ids[2][:3]),
            pb.ChoiceOutput(choice=0, output_ids=ids[0], finished=True),
        ]
        answer = await worker.generate(prompt.start([ref], sampling=sampling, outputs=sent))
        assert answer.tokens == {1: ids[1], 2: ids[2][3:]}
        starts = [d.first_index for d in answer.deltas if d.choice == 2]
        assert starts[0] == 3 and starts == sorted(starts)
        assert answer.done is not None
        assert answer.done.usage.completion_tokens == 3 * 24
        logprobs = [p for d in answer.deltas if d.choice == 2 for p in d.logprobs]
        expected = [p for d in whole.deltas if d.choice == 2 for p in d.logprobs][3:]
        assert [p.sampled.logprob for p in logprobs] == pytest.approx(
            [p.sampled.logprob for p in expected], abs=1e-4
        )

    serve(body)


# ---- rows that come later, or not


def test_rows_that_come_later(demo: Demo, serve: Callable[..., None]) -> None:
    picture = demo.picture(8)
    prompt = demo.prompt(20, picture, 5, seed=7)

    async def body(worker: Worker) -> None:
        call = await worker.open(prompt.start())
        other = await worker.generate(demo.prompt(5).start())  # Nobody else waits for it.
        assert other.done is not None
        await call.write(ready(worker.put(picture)))
        answer = await read(call)
        assert answer.tokens[0] == demo.reference(prompt, TOKENS)
        assert answer.needed == []
        assert answer.done is not None
        assert answer.done.timings.embedding_wait_ms > 0

    serve(body)


def delete(path: Path) -> None:
    path.unlink()


def damage_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def damage_end(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def damage_data(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(b"\x01" * 20)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (delete, "EVICTED"),
        (damage_header, "CORRUPT"),
        (damage_end, "CORRUPT"),
        (damage_data, "CORRUPT"),
    ],
)
def test_lost_rows_are_asked_for_again(
    demo: Demo, serve: Callable[..., None], damage: Callable[[Path], None], reason: str
) -> None:
    picture = demo.picture(9)
    prompt = demo.prompt(6, picture, 5, seed=8)

    async def body(worker: Worker) -> None:
        ref = worker.put(picture)
        assert isinstance(worker.store, ShmStore)
        damage(worker.store.directory / f"{picture.key}.safetensors")
        call = await worker.open(prompt.start([ref]))
        answer = await next_message(call)
        assert answer.needed == [(picture.key, reason)]
        await call.write(ready(worker.put(picture)))
        answer = await read(call)
        assert answer.tokens[0] == demo.reference(prompt, TOKENS)

    serve(body)


def test_a_reference_to_nowhere_is_not_found(demo: Demo, serve: Callable[..., None]) -> None:
    picture = demo.picture(10)
    prompt = demo.prompt(6, picture, 5)

    async def body(worker: Worker) -> None:
        call = await worker.open(prompt.start([picture.ref(Location(shm_tier_id="another"))]))
        assert (await next_message(call)).needed == [(picture.key, "NOT_FOUND")]
        await call.write(ready(worker.put(picture)))
        assert (await read(call)).tokens[0] == demo.reference(prompt, TOKENS)

    serve(body)


def test_rows_that_do_not_fit_their_reference_are_corrupt(
    demo: Demo, serve: Callable[..., None]
) -> None:
    picture = demo.picture(10)
    prompt = demo.prompt(6, picture, 5)
    wrong = Picture(
        picture.key, picture.plan, picture.pixels, {"rows": picture.rows["rows"][:, :-1].clone()}
    )

    async def body(worker: Worker) -> None:
        worker.store.put(picture.key, wrong.rows, {})
        call = await worker.open(prompt.start([picture.ref(worker.here())]))
        assert (await next_message(call)).needed == [(picture.key, "CORRUPT")]
        await call.write(ready(worker.put(picture)))
        assert (await read(call)).tokens[0] == demo.reference(prompt, TOKENS)

    serve(body)


def test_rows_that_stay_away_fail_after_the_deadline(
    demo: Demo, serve: Callable[..., None]
) -> None:
    picture = demo.picture(13)
    prompt = demo.prompt(6, picture, 5)

    async def body(worker: Worker) -> None:
        with pytest.raises(EmbeddingNotFound, match="did not come within"):
            await worker.generate(prompt.start(embedding_wait_ms=100))
        call = await worker.open(prompt.start([picture.ref(worker.here())], embedding_wait_ms=100))
        assert (await next_message(call)).needed == [(picture.key, "EVICTED")]
        with pytest.raises(EmbeddingEvicted, match="did not come within"):
            await read(call)

    serve(body)


def test_two_encodes_in_vain_are_enough(demo: Demo, serve: Callable[..., None]) -> None:
    picture = demo.picture(13)
    prompt = demo.prompt(6, picture, 5)
    nowhere = picture.ref(Location(inline=b"nonsense"))

    async def body(worker: Worker) -> None:
        call = await worker.open(prompt.start([nowhere]))
        for _ in range(2):
            assert (await next_message(call)).needed == [(picture.key, "CORRUPT")]
            await call.write(ready(nowhere))
        with pytest.raises(EmbeddingCorrupt):
            await read(call)

    serve(body)


def test_an_item_that_cannot_be_had_fails_the_request(
    demo: Demo, serve: Callable[..., None]
) -> None:
    picture = demo.picture(13)
    prompt = demo.prompt(6, picture, 5)
    detail = embedding_pb2.ErrorDetail(kind="InvalidMedia", message="not a picture", code="x")

    async def body(worker: Worker) -> None:
        with pytest.raises(InvalidMedia, match="not a picture"):
            await worker.generate(prompt.start(), failed(picture.key, detail))

    serve(body)


def test_a_tier_without_room_does_not_fail_requests(demo: Demo, serve: Callable[..., None]) -> None:
    pictures = [demo.picture(seed, (168, 168)) for seed in (20, 21, 22)]
    prompts = [demo.prompt(6, picture, 5, seed=picture.plan.width) for picture in pictures]

    async def body(worker: Worker) -> None:
        answers = await asyncio.gather(
            *(
                worker.generate(prompt.start([picture.ref(Location(inline=picture.data()))]))
                for prompt, picture in zip(prompts, pictures, strict=True)
            )
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.tokens[0] == demo.reference(prompt, TOKENS)

    serve(body, capacity="20KiB")
    serve(body, store="memory://?capacity=100")


def test_many_choices_take_rows_again_that_no_tier_keeps(
    demo: Demo, serve: Callable[..., None]
) -> None:
    picture = demo.picture(23, (168, 168))
    prompt = demo.prompt(6, picture, 5)

    async def body(worker: Worker) -> None:
        start = prompt.start(
            [picture.ref(Location(inline=picture.data()))], sampling={"n": 20, "max_tokens": 2}
        )
        answer = await worker.generate(start)
        want = demo.reference(prompt, TOKENS)[:2]
        assert answer.tokens == dict.fromkeys(range(20), want)

    serve(body, store="memory://?capacity=100", no_prefix_caching=True, max_num_seqs=2)


class OneEncoder(encoder_pb2_grpc.EncoderServicer):
    """Serves Fetch alone."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.calls = 0

    async def Fetch(
        self, request: encoder_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[encoder_pb2.FetchResponse]:
        self.calls += 1
        for chunk in chunks(self.data, 1000):
            yield encoder_pb2.FetchResponse(num_bytes=len(self.data), data=chunk)


@contextlib.asynccontextmanager
async def encoder_with(data: bytes) -> AsyncIterator[tuple[OneEncoder, str]]:
    server = grpc.aio.server()
    servicer = OneEncoder(data)
    encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0)


def test_rows_are_fetched_from_their_encoder_once(demo: Demo, serve: Callable[..., None]) -> None:
    picture = demo.picture(14)
    prompts = [demo.prompt(count, picture, 5) for count in (3, 4, 5)]

    async def body(worker: Worker) -> None:
        async with encoder_with(picture.data()) as (encoder, address):
            start = [p.start([picture.ref(Location(fetch_address=address))]) for p in prompts]
            answers = await asyncio.gather(*map(worker.generate, start))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens[0] == demo.reference(prompt, TOKENS)
            assert encoder.calls == 1
        assert worker.store.contains([picture.key]) == {picture.key}

    serve(body)


def test_a_fetch_that_fails_is_asked_for(demo: Demo, serve: Callable[..., None]) -> None:
    picture = demo.picture(14)
    prompt = demo.prompt(4, picture, 5)

    async def body(worker: Worker) -> None:
        async with encoder_with(picture.data() + b"\0" * 2**20) as (_, address):
            call = await worker.open(prompt.start([picture.ref(Location(fetch_address=address))]))
            assert (await next_message(call)).needed == [(picture.key, "CORRUPT")]
        await call.write(ready(picture.ref(Location(fetch_address=address))))  # It is gone.
        assert (await next_message(call)).needed == [(picture.key, "NOT_FOUND")]
        await call.write(ready(worker.put(picture)))
        assert (await read(call)).tokens[0] == demo.reference(prompt, TOKENS)

    serve(body)


# ---- leaving


def test_cancelling_frees_everything(demo: Demo, serve: Callable[..., None]) -> None:
    picture = demo.picture(15)
    long = {"max_tokens": 900, "ignore_eos": True}

    async def body(worker: Worker) -> None:
        free = (await worker.stub.Describe(pb.DescribeLLMRequest())).load.free_kv_blocks
        ref = worker.put(picture)
        calls = [
            await worker.open(demo.prompt(6, picture, 5).start([ref], sampling=long)),
            await worker.open(demo.prompt(6).start(sampling=long)),
            await worker.open(demo.prompt(7, demo.picture(16), 5).start(sampling=long)),
        ]
        for call in calls[:2]:
            assert (await next_message(call)).tokens
        for call in calls:
            call.cancel()
        async with asyncio.timeout(WAIT_S):
            while worker.loaded.engine.stats.running:
                await asyncio.sleep(0.005)
        await worker.idle()
        assert worker.store.leasable_bytes() >= 60 * 2**20
        described = await worker.stub.Describe(pb.DescribeLLMRequest())
        assert described.load.free_kv_blocks == free
        assert (described.load.running, described.load.waiting) == (0, 0)

    serve(body, no_prefix_caching=True)


def test_a_slow_reader_gets_everything(demo: Demo, serve: Callable[..., None]) -> None:
    prompt = demo.prompt(6)

    async def body(worker: Worker) -> None:
        sampling = {"max_tokens": 300, "ignore_eos": True, "logprobs": 20}
        call = await worker.open(prompt.start(sampling=sampling))
        answer = await next_message(call)
        async with asyncio.timeout(WAIT_S):
            while worker.loaded.engine.stats.running:
                await asyncio.sleep(0.005)
        await read(call, answer)
        assert len(answer.tokens[0]) == 300
        assert answer.done is not None
        indices = [delta.first_index for delta in answer.deltas]
        assert indices == sorted(indices)

    serve(body)


def test_what_piled_up_for_a_slow_reader_fits_messages(
    demo: Demo, serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "PIECE_BYTES", 30_000)
    prompt = demo.prompt(6)

    async def body(worker: Worker) -> None:
        sampling = {"max_tokens": 300, "n": 3, "ignore_eos": True, "logprobs": 20}
        call = await worker.open(prompt.start(sampling=sampling))
        await next_message(call)
        async with asyncio.timeout(WAIT_S):
            while worker.loaded.engine.stats.running:
                await asyncio.sleep(0.005)
        answer, sizes = Answer(), [0]
        while isinstance(message := await call.read(), pb.GenerateOut):
            answer.take(message)
            sizes.append(message.ByteSize())
        assert max(sizes) < 3 * 30_000
        assert sum(sizes) > 100_000
        for choice in range(3):
            deltas = [delta for delta in answer.deltas if delta.choice == choice]
            starts = [delta.first_index for delta in deltas]
            assert starts[1:] == [d.first_index + len(d.token_ids) for d in deltas[:-1]]
            assert [d.finish_reason for d in deltas if d.finish_reason] == [pb.FINISH_REASON_LENGTH]
            assert deltas[-1].finish_reason
            assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
        assert answer.done is not None

    serve(body)


# ---- refusals


def spans(*given: Span) -> dict[str, Any]:
    return {"spans": [convert.span_to_pb(span) for span in given]}


def test_bad_requests_are_refused_and_harm_nobody(demo: Demo, serve: Callable[..., None]) -> None:
    picture = demo.picture(17)
    text, seen = demo.prompt(6), demo.prompt(6, picture, 5)
    span = seen.spans[0]
    nan = float("nan")
    far = Span(500, span.num_tokens, 0, 0, span.modality, span.grid_thw)
    late = Span(7, span.num_tokens, 0, 9, span.modality, span.grid_thw)  # Rows 9 and more.
    ref = picture.ref()
    cases: list[tuple[pb.GenerateIn, type[OpticNerveError], str | None]] = [
        (pb.GenerateIn(), InvalidRequest, "start"),
        (ready(ref), InvalidRequest, "start"),
        (text.start(token_ids=[]), InvalidRequest, "token_ids"),
        (text.start(token_ids=[5, 10**6]), InvalidRequest, "token_ids"),
        (text.start(adapter="lora"), UnsupportedFeature, "adapter"),
        (text.start(outputs=[pb.ChoiceOutput(choice=1)]), InvalidRequest, "outputs"),
        (text.start(outputs=[pb.ChoiceOutput(output_ids=[640])]), InvalidRequest, "outputs"),
        (text.start(sampling={"max_tokens": 0}), InvalidRequest, "max_tokens"),
        (text.start(sampling={"max_tokens": 5000}), ContextLengthExceeded, "max_tokens"),
        (text.start(sampling={"temperature": nan}), InvalidRequest, "temperature"),
        (text.start(sampling={"temperature": -1.0}), InvalidRequest, "temperature"),
        (text.start(sampling={"top_p": 1.5}), InvalidRequest, "top_p"),
        (text.start(sampling={"n": 1000}), InvalidRequest, "n"),
        *((text.start(weight=each), InvalidRequest, "weight") for each in (nan, -1.0, 1e4)),
        (text.start(sampling={"logprobs": 21}), InvalidRequest, "logprobs"),
        (text.start(sampling={"logit_bias": {10**6: 1.0}}), InvalidRequest, "logit_bias"),
        (text.start(sampling={"logit_bias": {1: nan}}), InvalidRequest, "logit_bias"),
        (text.start(sampling={"logit_bias": {1: 1e300}}), InvalidRequest, "logit_bias"),
        (
            text.start(sampling={"repetition_penalty": 1e-50}),
            InvalidRequest,
            "repetition_penalty",
        ),
        (text.start(sampling={"grammar": "x" * (2**20 + 1)}), InvalidRequest, "grammar"),
        (seen.start(**spans(far)), InvalidRequest, "spans"),
        (seen.start(**spans(span, span)), InvalidRequest, "spans"),
        (seen.start(items=[]), InvalidRequest, "spans"),
        (seen.start(items=[pb.Item(key="../../etc/passwd")]), InvalidRequest, "key"),
        (
            seen.start(**spans(Span(7, span.num_tokens, 0, 0, span.modality, Grid(1, 2, 2)))),
            InvalidRequest,
            "spans",
        ),
        (
            seen.start([ref], **spans(late)),
            InvalidRequest,
            "spans",
        ),
    ]

    async def body(worker: Worker) -> None:
        for message, cls, param in cases:
            with pytest.raises(OpticNerveError) as caught:
                await worker.generate(message)
            assert type(caught.value) is cls, (message, caught.value)
            assert caught.value.param == param, (message, caught.value)
        good = seen.start([worker.put(picture)])
        assert (await worker.generate(good)).tokens[0] == demo.reference(seen, TOKENS)
        for later in (good, ready(demo.picture(18).ref())):
            with pytest.raises(InvalidRequest):
                await worker.generate(demo.prompt(3, picture, 3).start(), later)

    serve(body)


def test_many_choices_of_one_share_leave_another_a_place(
    demo: Demo, serve: Callable[..., None]
) -> None:
    """By requests on the wire: the victim's answer is whole while most of the other is to come."""
    many = {"n": 8, "max_tokens": 400, "ignore_eos": True}

    async def test(worker: Worker) -> None:
        attack = await worker.open(demo.prompt(20).start(share="mallory", sampling=many))
        answer = await next_message(attack)
        while len(answer.tokens) < 2:  # All places are taken.
            answer.take(await attack.read())
        got = await worker.generate(demo.prompt(30, seed=1).start(share="ada", weight=2.0))
        assert got.tokens == await alone(worker)
        assert worker.loaded.engine.stats.waiting >= 5  # Choices that have not begun.
        attack.cancel()

    async def alone(worker: Worker) -> dict[int, list[int]]:
        return (await worker.generate(demo.prompt(30, seed=1).start())).tokens

    serve(test, max_num_seqs=2)


def test_too_many_are_refused_with_a_hint(demo: Demo, serve: Callable[..., None]) -> None:
    sampling = {"max_tokens": 200, "ignore_eos": True}

    async def body(worker: Worker) -> None:
        starts = [demo.prompt(6, seed=i).start(sampling=sampling) for i in range(8)]
        results = await asyncio.gather(*map(worker.generate, starts), return_exceptions=True)
        refused = [result for result in results if isinstance(result, Overloaded)]
        assert refused
        assert all(result.retry_after_s for result in refused)
        assert len(refused) + sum(isinstance(result, Answer) for result in results) == 8

    serve(body, max_num_seqs=1, max_waiting=2)


def test_describe_and_drain(demo: Demo, serve: Callable[..., None]) -> None:
    async def body(worker: Worker) -> None:
        told = await worker.stub.Describe(pb.DescribeLLMRequest())
        assert (told.family, told.dtype, told.device) == ("qwen2_vl", "float32", "cpu")
        assert told.hidden_size == demo.layout.hidden_size
        assert told.shm_tier_id == worker.store.tier_id
        assert len(told.pair_id) == len(told.fingerprint) == 64
        assert list(told.eos_token_ids) == [EOS]
        assert told.limits.max_model_len == 1024
        assert told.limits.num_kv_blocks * told.limits.block_size == 4096
        assert told.limits.prefix_cache_tokens == 4096
        assert told.instance_id == worker.server.instance_id
        assert await is_serving(worker.channel)
        worker.server.running.draining = True
        assert (await worker.stub.Describe(pb.DescribeLLMRequest())).load.draining
        with pytest.raises(Unavailable):
            await worker.generate(demo.prompt(3).start())
        worker.server.running.draining = False

    serve(body)


# ---- processes


def start_service(*flags: str) -> tuple[subprocess.Popen[str], str]:
    """A worker in a process of its own, and its address."""
    command = [sys.executable, "-m", "llm_service", "--threads", "1", "--dtype", "float32", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[1]


async def serving(address: str) -> None:
    channel = open_channel(address)
    try:
        async with asyncio.timeout(200):
            while not await is_serving(channel):
                await asyncio.sleep(0.05)
    finally:
        await channel.close()


@pytest.mark.process
@pytest.mark.parametrize("engine", ["thread", "process"])
def test_a_process_serves_drains_and_leaves(demo: Demo, tmp_path: Path, engine: str) -> None:
    from opticnerve.pb import llm_pb2_grpc

    picture = demo.picture(19)
    prompt = demo.prompt(5, picture, 6)
    directory = tmp_path / "tier"
    flags = ("--engine", engine, "--store", f"shm://{directory}", "--kv-cache-tokens", "2048")
    process, address = start_service(*flags)

    async def talk() -> None:
        await serving(address)
        store = ShmStore(directory)
        store.put(picture.key, picture.rows, {})
        channel = open_channel(address)
        try:
            call = llm_pb2_grpc.LLMStub(channel).Generate(timeout=WAIT_S)
            await call.write(prompt.start([picture.ref(Location(shm_tier_id=store.tier_id))]))
            assert (await read(call)).tokens[0] == demo.reference(prompt, TOKENS)
            picture_gone = demo.prompt(9, demo.picture(23), 6)
            call = llm_pb2_grpc.LLMStub(channel).Generate(timeout=WAIT_S)
            await call.write(picture_gone.start())
            store.put(picture_gone.pictures[0].key, picture_gone.pictures[0].rows, {})
            await call.write(ready(picture_gone.pictures[0].ref()))
            assert (await read(call)).tokens[0] == demo.reference(picture_gone, TOKENS)
        finally:
            await channel.close()
            store.close()

    try:
        asyncio.run(talk())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 0
        assert list((directory / "holders").iterdir()) == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.process
def test_a_lost_engine_ends_the_process(demo: Demo, tmp_path: Path) -> None:
    process, address = start_service("--engine", "process", "--store", f"shm://{tmp_path}/tier")
    try:
        asyncio.run(serving(address))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        engines = [
            int(child)
            for child in children
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        assert len(engines) == 1
        os.kill(engines[0], signal.SIGKILL)
        assert process.wait(timeout=100) == 1
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--max-model-len", "99999999"], "exceeds the model's"),
        (["--engine", "process", "--store", "memory://"], "processes share"),
        (["--store", "http://x"], "the store is"),
        (["--store", "file:///x"], "cannot read the URL of --store"),
        (
            ["--kv-cache-tokens", "16", "--port", "1", "--host", "203.0.113.1", "--insecure"],
            "cannot listen",
        ),
    ],
)
def test_what_cannot_start_says_why(flags: list[str], text: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=text):
        main([*(["--store", f"shm://{tmp_path}/t"] if "--store" not in flags else []), *flags])


@pytest.mark.process
def test_a_start_that_fails_exits_with_status_2() -> None:
    command = [sys.executable, "-m", "llm_service", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith("opticnerve: there is no directory /no/such/model")
    assert "Traceback" not in done.stderr
