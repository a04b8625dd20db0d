"""The encoder behind its wire: real gRPC in this process, a backend without a model."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import grpc
import pytest
from PIL import Image
from prometheus_client import REGISTRY

from encoder_service.servicer import SERVICE, EncoderServicer
from opticnerve.config import RpcConfig
from opticnerve.content_keys import content_key
from opticnerve.embeddings import codec
from opticnerve.embeddings.memory_store import MemoryStore
from opticnerve.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidMedia,
    InvalidRequest,
    Mispaired,
    NotFound,
    OpticNerveError,
    Overloaded,
    PayloadTooLarge,
    PlanMismatch,
    PoisonousItem,
    StoreFull,
    Unavailable,
    UnsupportedFeature,
)
from opticnerve.media.plan import Overrides, Plan
from opticnerve.pb import embedding_pb2, encoder_pb2_grpc
from opticnerve.pb import encoder_pb2 as pb
from opticnerve.rpc.channel import is_serving, open_channel
from opticnerve.rpc.errors import from_rpc
from opticnerve.rpc.server import Server
from tests import hostile
from tests.encoders import FINGERPRINT, WAIT_S, FakeBackend, Running, picture, refusal, running
from tests.fakes import until
from tests.fault_counters import Faults


async def entered(service: Running) -> None:
    """Waits until a batch is on the device."""
    assert await asyncio.to_thread(service.backend.entered.acquire, timeout=WAIT_S)


# ---- the path of a good picture


def nothing_on_black(size: tuple[int, int] = (84, 84)) -> bytes:
    """A picture that is transparent all over, and black under it."""
    buffer = io.BytesIO()
    Image.new("RGBA", size, (0, 0, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_each_background_has_its_own_embedding(tmp_path: Path) -> None:
    """A caller that knows of none gets what it always got, under the key that it always gave."""

    async def scenario() -> None:
        async with running(tmp_path) as service:
            found: dict[str, float] = {}
            for message in (
                overrides(),
                overrides(background=0),
                overrides(background=0xFFFFFF),
                overrides(background=0x0000FF),
            ):
                answer = await service.encode(nothing_on_black(), overrides=message)
                tensors, _ = codec.from_bytes(await service.fetch(answer.ref.key))
                found[answer.ref.key] = float(tensors["rows"][0, 0])
            assert list(found.values()) == [0.0, 0.0, 765.0, 255.0]

    asyncio.run(scenario())


async def encodes_and_fetches(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        data = picture(1, (336, 336), "JPEG")
        answer = await service.encode(data, chunk=1000)
        assert answer.ref.num_rows == 9
        assert answer.ref.location.fetch_address == service.server.address
        timings = answer.timings
        assert not timings.hit and timings.batch_items == 1 and timings.batch_patches == 36
        assert timings.preprocess_ms > 0 and timings.encode_ms > 0 and timings.put_ms > 0
        tensors, meta = codec.from_bytes(await service.fetch(answer.ref.key))
        assert list(tensors) == ["rows"] and tuple(tensors["rows"].shape) == (9, 8)
        assert meta["key"] == answer.ref.key
        again = await service.encode(data)
        assert again.timings.hit and again.ref == answer.ref and again.timings.encode_ms == 0
        assert service.backend.batches == [1]


def test_encodes_and_fetches(tmp_path: Path) -> None:
    asyncio.run(encodes_and_fetches(tmp_path))


def test_a_hit_needs_no_bytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            data = picture(1)
            await service.encode(data)
            header_only = service.messages(data)[:1]
            answer = await service.stub.Encode(iter(header_only), timeout=WAIT_S)
            assert answer.timings.hit

    asyncio.run(scenario())


def test_a_large_embedding_is_fetched_in_chunks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            rows = {"rows": codec.torch.zeros(70_000, 8)}
            service.encoder.results.store.put("a" * 64, rows, {})
            request = pb.FetchRequest(key="a" * 64)
            parts = [part async for part in service.stub.Fetch(request, timeout=WAIT_S)]
            assert len(parts) == 3 and max(len(part.data) for part in parts) == 2**20
            assert [part.num_bytes > 0 for part in parts] == [True, False, False]

    asyncio.run(scenario())


def test_describe_tells_identity_limits_and_load(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, max_batch_patches=64) as service:
            service.backend.hold()
            call = service.encode(picture(1))
            await entered(service)
            about = await service.stub.Describe(pb.DescribeEncoderRequest(), timeout=WAIT_S)
            assert about.fingerprint == "f" * 64 and about.family == "qwen2_vl"
            assert about.pair_id == "pair" and about.backend == "fake" and about.version
            assert about.limits.max_batch_patches == 64
            assert about.limits.max_queue_patches == 16 * about.limits.max_item_patches
            assert (about.load.queued_items, about.load.queued_patches) == (1, 36)
            service.backend.go()
            await call
            about = await service.stub.Describe(pb.DescribeEncoderRequest(), timeout=WAIT_S)
            assert (about.load.queued_items, about.load.encoded_items) == (0, 1)

    asyncio.run(scenario())


# ---- bad input: a typed error each, and the service goes on


def bomb() -> bytes:
    """A PNG whose header says 20000x20000."""
    data = bytearray(picture())
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (84, 84), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


PLAN = embedding_pb2.Plan(
    modality=embedding_pb2.MODALITY_IMAGE,
    format="png",
    width=84,
    height=84,
    orientation=1,
    resized_width=84,
    resized_height=84,
    grid=embedding_pb2.Grid(t=1, h=6, w=6),
    num_tokens=9,
    num_patches=36,
    frames=1,
)


def changed(**fields: object) -> embedding_pb2.Plan:
    plan = embedding_pb2.Plan()
    plan.CopyFrom(PLAN)
    plan.MergeFrom(embedding_pb2.Plan(**fields))
    return plan


overrides = embedding_pb2.ProcessorOverrides

BAD: list[tuple[str, bytes, dict[str, object], type[OpticNerveError]]] = [
    ("not a picture", b"hello", {"plan": PLAN}, InvalidMedia),
    ("nothing", b"", {"plan": PLAN}, InvalidMedia),
    ("truncated", picture(1, (336, 336), "JPEG")[:3000], {}, InvalidMedia),
    ("a bomb", bomb(), {"plan": PLAN}, InvalidMedia),
    ("an animation", animation(), {"plan": PLAN}, InvalidMedia),
    ("too many scans", hostile.many_scans(1000, (2000, 1500)), {"plan": PLAN}, InvalidMedia),
    ("another size", picture(), {"plan": changed(width=85)}, PlanMismatch),
    ("another grid", picture(), {"plan": changed(num_patches=48)}, PlanMismatch),
    ("another format", picture(), {"plan": changed(format="jpeg")}, PlanMismatch),
    ("another orientation", picture(), {"plan": changed(orientation=6)}, PlanMismatch),
    ("another key", picture(), {"key": "0" * 64}, InvalidRequest),
    ("no key", picture(), {"key": ""}, InvalidRequest),
    ("a path as key", picture(), {"key": "../" * 21 + "a"}, InvalidRequest),
    ("another fingerprint", picture(), {"fingerprint": "0" * 64}, Mispaired),
    ("too many bytes", picture(), {"num_bytes": 2**20 + 1}, PayloadTooLarge),
    ("more than announced", picture(), {"num_bytes": 10}, InvalidRequest),
    ("less than announced", picture(), {"num_bytes": 10_000}, InvalidRequest),
    ("too many patches", picture(), {"plan": changed(num_patches=10**6)}, InvalidRequest),
    ("a video", picture(), {"plan": changed(frames=4)}, UnsupportedFeature),
    ("no plan", picture(), {"plan": None}, InvalidRequest),
    ("no colour", picture(), {"overrides": overrides(background=2**24)}, InvalidRequest),
]


def test_bad_input_is_refused_by_type_and_the_next_item_works(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            for name, data, changes, kind in BAD:
                error = await refusal(service.encode(data, **changes))
                assert type(error) is kind, f"{name}: {error!r}"
                assert "Plan(" not in error.message and len(error.message) < 200, name
            assert (await service.encode(picture(5))).ref.num_rows == 9
            assert service.backend.batches == [1]

    asyncio.run(scenario())


def test_messages_out_of_order_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            first, *rest = service.messages(picture())
            for messages in ([], rest, [first, first, *rest]):
                error = await refusal(service.stub.Encode(iter(messages), timeout=WAIT_S))
                assert type(error) is InvalidRequest and error.param == "header"
            oversize = pb.EncodeRequest(data=b"x" * (2**20 + 1))
            error = await refusal(service.stub.Encode(iter([first, oversize]), timeout=WAIT_S))
            assert isinstance(error, PayloadTooLarge)

    asyncio.run(scenario())


def test_probe_says_what_to_do_and_fetch_of_nothing_is_not_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.stub.Probe(iter([pb.ProbeRequest()]), timeout=WAIT_S)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert isinstance(from_rpc(caught.value), UnsupportedFeature)
            assert "still pictures" in caught.value.details()
            for key, kind in (("a" * 64, NotFound), ("../x", InvalidRequest)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await service.fetch(key)
                assert type(from_rpc(caught.value)) is kind

    asyncio.run(scenario())


# ---- sharing, waiting, leaving


def test_a_salt_is_part_of_the_key(tmp_path: Path) -> None:
    """Of one picture, callers of two salts share neither a look-up nor an encode."""

    async def scenario() -> None:
        async with running(tmp_path) as encoder:
            data, layout = picture(1), encoder.encoder.model.layout
            keys = {
                salt: content_key(data, layout.settings(), Overrides(), FINGERPRINT, salt)
                for salt in ("", "a", "b")
            }
            calls = [encoder.encode(data, key=key, cache_salt=salt) for salt, key in keys.items()]
            answers = await asyncio.gather(*calls)
            assert {answer.ref.key for answer in answers} == set(keys.values())
            assert not any(answer.timings.hit for answer in answers)
            assert sum(encoder.backend.batches) == 3
            again = await encoder.encode(data, key=keys["a"], cache_salt="a")
            assert again.timings.hit
            other = picture(2)
            key = content_key(other, layout.settings(), Overrides(), FINGERPRINT, "a")
            for salt in ("", "b"):
                error = await refusal(encoder.encode(other, key=key, cache_salt=salt))
                assert isinstance(error, InvalidRequest) and error.param == "key"

    asyncio.run(scenario())


def test_calls_of_one_key_share_one_encode(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            service.backend.hold()
            calls = [service.encode(picture(1)) for _ in range(5)]
            await entered(service)
            service.backend.go()
            answers = await asyncio.gather(*calls)
            assert service.backend.batches == [1]
            assert len({answer.ref.key for answer in answers}) == 1

    asyncio.run(scenario())


def test_a_shared_encode_outlives_its_first_caller(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            service.backend.hold()
            blocker = service.encode(picture(0))
            await entered(service)
            first = service.encode(picture(1))
            await until(lambda: service.encoder.backlog.items == 2)
            second = service.encode(picture(1))
            await until(lambda: _waiters(service) == 3)
            first.cancel()
            await until(lambda: _waiters(service) == 2)
            service.backend.go()
            assert (await second).ref.num_rows == 9
            await blocker
            assert service.backend.batches == [1, 1]

    asyncio.run(scenario())


def _waiters(service: Running) -> int:
    return sum(flight.waiters for flight in service.encoder._flights._flights.values())


def test_a_cancelled_item_is_dropped_before_launch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            service.backend.hold()
            blocker = service.encode(picture(0))
            await entered(service)
            gone = service.encode(picture(1))
            await until(lambda: len(service.encoder._batcher._queue) == 1)
            gone.cancel()
            await until(lambda: service.encoder.backlog.items == 1)
            service.backend.go()
            await blocker
            await service.encode(picture(2))
            assert service.backend.batches == [1, 1]

    asyncio.run(scenario())


def test_an_item_whose_deadline_passed_is_dropped_before_launch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            service.backend.hold()
            blocker = service.encode(picture(0))
            await entered(service)
            error = await refusal(service.encode(picture(1), timeout=0.3))
            assert isinstance(error, DeadlineExceeded)
            await until(lambda: service.encoder.backlog.items == 1)
            service.backend.go()
            await blocker
            await service.encode(picture(2))
            assert service.backend.batches == [1, 1]

    asyncio.run(scenario())


def test_a_full_queue_says_when_to_retry(tmp_path: Path, faults: Faults) -> None:
    async def scenario() -> None:
        async with running(tmp_path, max_queue_patches=72) as service:
            service.backend.hold()
            calls = [service.encode(picture(seed)) for seed in range(2)]
            await until(lambda: service.encoder.backlog.items == 2)
            error = await refusal(service.encode(picture(9)))
            assert isinstance(error, Overloaded) and error.retry_after_s
            service.backend.go()
            await asyncio.gather(*calls)
            await service.encode(picture(9))

    asyncio.run(scenario())
    assert faults() == {("errors", "overloaded", "Encode"): 1}


def test_what_waits_becomes_one_batch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, max_batch_patches=36 * 3) as service:
            service.backend.hold()
            blocker = service.encode(picture(0))
            await entered(service)
            calls = [service.encode(picture(seed)) for seed in range(1, 6)]
            await until(lambda: len(service.encoder._batcher._queue) == 5)
            service.backend.go()
            answers = await asyncio.gather(blocker, *calls)
            assert service.backend.batches == [1, 3, 2]
            assert sorted(answer.timings.batch_items for answer in answers) == [1, 2, 2, 3, 3, 3]

    asyncio.run(scenario())


# ---- failures of the device, the store, the process


def test_one_bad_item_fails_alone_and_memory_splits_the_batch(
    tmp_path: Path, faults: Faults
) -> None:
    wide = picture(3, (112, 84))

    def fail(plans: Sequence[Plan]) -> None:
        if any(plan.width == 112 for plan in plans):
            raise ValueError("cannot")
        if len(plans) > 2:
            raise MemoryError

    async def scenario() -> None:
        async with running(tmp_path, backend=FakeBackend(fail)) as service:
            service.backend.hold()
            blocker = service.encode(picture(0))
            await entered(service)
            good = [service.encode(picture(seed)) for seed in (1, 2)]
            await until(lambda: len(service.encoder._batcher._queue) == 2)
            bad = service.encode(wide)
            await until(lambda: len(service.encoder._batcher._queue) == 3)
            service.backend.go()
            await asyncio.gather(blocker, *good)
            error = await refusal(bad)
            assert isinstance(error, EngineFailure) and "cannot" not in error.message
            service.backend.hold()
            blocker = service.encode(picture(10))
            await entered(service)
            many = [service.encode(picture(seed)) for seed in range(11, 15)]
            await until(lambda: len(service.encoder._batcher._queue) == 4)
            service.backend.batches.clear()
            service.backend.go()
            await asyncio.gather(blocker, *many)
            assert service.backend.batches == [4, 2, 2]

    asyncio.run(scenario())
    assert faults() == {
        ("batches_split", "error"): 1,
        ("errors", "engine_failure", "Encode"): 1,
        ("batches_split", "memory"): 1,
    }


class FullStore(MemoryStore):
    def put(self, key: str, tensors: object, meta: object) -> None:
        raise StoreFull("no room")


def test_a_store_that_refuses_still_answers_and_fetch_serves(
    tmp_path: Path, faults: Faults
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, store=MemoryStore(1)) as service:
            answer = await service.encode(picture(1))
            location = answer.ref.location
            assert location.fetch_address == service.server.address
            assert not location.redis and not location.shm_tier_id
            tensors, _ = codec.from_bytes(await service.fetch(answer.ref.key))
            assert tuple(tensors["rows"].shape) == (9, 8)
            assert (await service.encode(picture(1))).timings.hit
            assert service.backend.batches == [1]

    asyncio.run(scenario())
    assert faults() == {("store_failures", "memory"): 1}


def test_what_a_store_refused_is_put_there_once_it_has_room(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = FullStore()
        async with running(tmp_path, store=store) as service:
            key = (await service.encode(picture(1))).ref.key
            assert not store.contains([key])
            again = await service.encode(picture(1), lost=True)  # ``put_bytes`` is not refused.
            assert again.timings.hit and store.contains([key])
            assert service.encoder.results.fallback.stored_bytes() == 0
            assert service.backend.batches == [1]

    asyncio.run(scenario())


def test_a_stored_embedding_of_other_rows_is_encoded_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            key = service.messages(picture(1))[0].header.key
            service.encoder.results.store.put(key, {"rows": codec.torch.zeros(5, 8)}, {})
            answer = await service.encode(picture(1))
            assert not answer.timings.hit and answer.ref.num_rows == 9

    asyncio.run(scenario())


def leave_mark(service: Running, data: bytes, worker: str) -> str:
    """As a worker that died with this item in work leaves it."""
    name = f"{worker}-{service.messages(data)[0].header.key}"
    (service.encoder.record.directory / name).touch()
    return name


@pytest.mark.process
def test_a_poisonous_item_is_refused_and_a_suspect_runs_alone(
    tmp_path: Path, faults: Faults
) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            suspect, poison = picture(1), picture(2)
            leave_mark(service, suspect, "dead1")
            marks = [leave_mark(service, poison, worker) for worker in ("dead1", "dead2")]
            assert isinstance(await refusal(service.encode(poison)), PoisonousItem)
            service.backend.hold()
            blocker = service.encode(picture(0))
            await entered(service)
            calls = [service.encode(data) for data in (suspect, picture(3))]
            await until(lambda: len(service.encoder._batcher._queue) == 2)
            service.backend.go()
            await asyncio.gather(blocker, *calls)
            assert service.backend.batches == [1, 1, 1]
            record = service.encoder.record.directory
            left = sorted(path.name for path in record.glob("dead*"))
            assert left == marks  # The suspect's name is clear.

    asyncio.run(scenario())
    assert faults() == {("errors", "unprocessable_media", "Encode"): 1}


@pytest.mark.process
def test_suspects_are_in_work_one_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            suspects = [picture(seed) for seed in range(3)]
            for data in suspects:
                leave_mark(service, data, "dead1")
            service.backend.hold()
            calls = [service.encode(data) for data in suspects]
            await entered(service)
            await until(lambda: service.encoder.backlog.items == 3)
            own = list(service.encoder.record.directory.glob(f"{service.encoder.record.worker}-*"))
            assert len(own) == 1 and len(service.encoder._batcher._queue) == 0
            service.backend.go()
            await asyncio.gather(*calls)
            assert service.backend.batches == [1, 1, 1]

    asyncio.run(scenario())


def test_a_call_with_a_wrong_plan_takes_nothing_from_the_store(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            await service.encode(picture(1))
            wrong = changed(num_tokens=12)
            assert isinstance(await refusal(service.encode(picture(1), plan=wrong)), PlanMismatch)
            assert (await service.encode(picture(1))).timings.hit

    asyncio.run(scenario())


def test_draining_finishes_running_work_and_refuses_new(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            service.backend.hold()
            call = service.encode(picture(0))
            await entered(service)
            serving = asyncio.create_task(service.server.serve())
            await asyncio.sleep(0)
            service.server.running.stop()
            await until(lambda: service.server.running.draining)
            service.backend.go()
            assert (await call).ref.num_rows == 9
            await asyncio.wait_for(serving, WAIT_S)
            with pytest.raises(grpc.aio.AioRpcError):
                await service.encode(picture(1), timeout=1.0)

    asyncio.run(scenario())


def test_an_item_that_outlasts_the_drain_ends_with_a_typed_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, drain_timeout_s=0.2) as service:
            service.backend.hold()
            call = service.encode(picture(0))
            await entered(service)
            service.server.running.stop()
            serving = asyncio.create_task(service.server.serve())
            error = await refusal(call)
            assert isinstance(error, Unavailable) and "stopping" in error.message
            assert error.retry_after_s
            await asyncio.wait_for(serving, WAIT_S)

    asyncio.run(scenario())


def test_the_event_loop_answers_while_the_device_works(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as service:
            service.backend.hold()
            call = service.encode(picture(0))
            await entered(service)
            await service.stub.Describe(pb.DescribeEncoderRequest(), timeout=WAIT_S)
            service.backend.go()  # Until here the device was at work.
            await call

    asyncio.run(scenario())


def test_a_lost_device_fails_its_items_and_stops_the_process(tmp_path: Path) -> None:
    def fail(plans: Sequence[Plan]) -> None:
        raise RuntimeError("the device is gone")

    async def scenario() -> None:
        backend = FakeBackend(fail)
        backend.lost = True
        async with running(tmp_path, backend=backend) as live:
            serving = asyncio.create_task(live.server.serve())
            assert await is_serving(live.channel)
            assert isinstance(await refusal(live.encode(picture(1))), EngineFailure)
            assert await asyncio.wait_for(serving, WAIT_S) == 1
            assert live.server.running.draining

    asyncio.run(scenario())


def test_metrics_tell_of_items_stages_and_lookups(tmp_path: Path) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    async def scenario() -> None:
        stages = ("encoder_queue", "preprocess", "encode", "put")
        before = [value("opticnerve_stage_seconds_count", stage=stage) for stage in stages]
        items = value("opticnerve_items_encoded_total")
        hits = value("opticnerve_embedding_lookups_total", tier="memory", result="hit")
        async with running(tmp_path) as service:
            service.backend.hold()
            call = service.encode(picture(1))
            await entered(service)
            assert value("opticnerve_patches_pending") == 36
            service.backend.go()
            await call
            await service.encode(picture(1))
        assert value("opticnerve_patches_pending") == 0
        after = [value("opticnerve_stage_seconds_count", stage=stage) for stage in stages]
        assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 1]
        assert value("opticnerve_items_encoded_total") == items + 1
        lookups = value("opticnerve_embedding_lookups_total", tier="memory", result="hit")
        assert lookups == hits + 1

    asyncio.run(scenario())


def test_before_the_checkpoint_is_loaded_calls_are_told_to_come_again() -> None:
    async def scenario() -> None:
        async with Server(RpcConfig(), SERVICE) as server:
            encoder_pb2_grpc.add_EncoderServicer_to_server(EncoderServicer(server), server.grpc)
            await server.start()
            async with open_channel(server.address) as channel:
                assert not await is_serving(channel)
                stub = encoder_pb2_grpc.EncoderStub(channel)
                for call in (
                    stub.Describe(pb.DescribeEncoderRequest(), timeout=WAIT_S),
                    stub.Encode(iter([pb.EncodeRequest()]), timeout=WAIT_S),
                ):
                    error = await refusal(call)
                    assert isinstance(error, Unavailable) and error.retry_after_s

    asyncio.run(scenario())


def test_callers_that_come_and_go_leave_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shared keys, cancellations, deadlines, bad items, at random; ``running`` checks the end."""
    random = Random(7)
    pictures = [picture(seed) for seed in range(12)]

    async def call(service: Running) -> str:
        data = random.choice(pictures)
        if random.random() < 0.1:
            data = data[: len(data) // 2]
            running_call = service.encode(data, plan=PLAN)
        else:
            running_call = service.encode(data, timeout=random.choice([0.01, 0.05, WAIT_S]))
        if random.random() < 0.3:
            asyncio.get_running_loop().call_later(random.random() * 0.05, running_call.cancel)
        try:
            return "hit" if (await running_call).timings.hit else "encoded"
        except asyncio.CancelledError:
            return "cancelled"
        except grpc.aio.AioRpcError as error:
            return type(from_rpc(error)).__name__

    async def scenario() -> None:
        async with running(tmp_path, max_batch_patches=80, max_queue_patches=300) as service:
            outcomes: Counter[str] = Counter()
            for _ in range(8):
                outcomes.update(await asyncio.gather(*(call(service) for _ in range(30))))
                for data in pictures:  # So that there is something to encode again.
                    key = service.messages(data)[0].header.key
                    service.encoder.results.store.delete(key)
            await until(lambda: service.encoder.backlog.items == 0)
            assert outcomes["encoded"] and outcomes["InvalidMedia"] and outcomes["cancelled"]
            assert not {"OpticNerveError", "EngineFailure", "Unavailable"} & outcomes.keys()
            assert not service.encoder._flights._flights
            assert not list(service.encoder.record.directory.glob("*-*"))
            assert (await service.encode(picture(99))).ref.num_rows == 9

    asyncio.run(scenario())
    assert "never retrieved" not in caplog.text
