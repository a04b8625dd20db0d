"""Pictures through the gateway: sent once, named, encoded again when lost."""

import asyncio
import base64
import contextlib
import threading
import time

import pytest

from gateway.media import reader as media
from opticnerve.content_keys import content_key
from opticnerve.errors import EmbeddingCorrupt, InvalidMedia, Overloaded, PayloadTooLarge
from opticnerve.media.plan import Overrides
from tests import hostile
from tests.fakes import until
from tests.gateways import END, data_url, events, ids, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop"), pytest.mark.slow]


async def test_pictures_go_to_encoders_once_and_their_references_are_kept():
    red, blue = data_url("red"), data_url("blue", (112, 56))
    async with stack(encoders=2) as s:
        answer = await s.chat(user("What?", red, blue, red), timings=True)
        told = answer.json()
        assert sum(len(encoder.calls) for encoder in s.encoders) == 2
        start = s.llm.starts[0]
        assert [span.num_tokens for span in start.spans] == [9, 15, 9]
        assert [start.items[span.item].key for span in start.spans].count(start.items[0].key) == 2
        assert told["usage"]["prompt_tokens_details"]["image_tokens"] == 33
        sizes = [len(base64.b64decode(url.partition(",")[2])) for url in (red, blue)]
        assert told["timings"]["bytes_to_encoders"] == sum(sizes)
        assert [item["cached"] for item in told["timings"]["items"]] == ["no"] * 3
        assert [item["tokens"] for item in told["timings"]["items"]] == [9, 15, 9]
        again = await s.chat(user("And now?", red), headers={"x-opticnerve-timings": "1"})
        timings = again.json()["timings"]
        assert timings["bytes_to_encoders"] == 0
        assert timings["items"] == [{"tokens": 9, "cached": "ref", "bytes_sent": 0}]
        assert timings["preemptions"] == 4
        assert s.llm.starts[1].items[0].HasField("ref")
        assert sum(len(encoder.calls) for encoder in s.encoders) == 2
        for name in ("fetch_ms", "plan_ms", "queue_ms", "prefill_ms", "ttft_ms", "total_ms"):
            assert name in timings


async def test_the_encoder_gets_plan_key_and_overrides():
    async with stack() as s:
        picture = {"url": data_url(size=(300, 200)), "max_pixels": 10_000}
        message = {"role": "user", "content": [{"type": "image_url", "image_url": picture}]}
        assert (await s.chat(message)).status_code == 200
        (header,) = s.encoder.calls
        assert header.overrides.max_pixels == 10_000
        plan = header.plan
        assert (plan.width, plan.height, plan.format) == (300, 200, "png")
        assert plan.resized_width * plan.resized_height <= 10_000
        assert header.key == s.llm.starts[0].items[0].key and header.fingerprint == "enc-1"


@pytest.mark.parametrize(
    ("flag", "sent"), [({}, 0xFFFFFF), ({"image_background": "#102030"}, 0x102030)]
)
async def test_the_encoder_gets_the_background(flag, sent):
    async with stack(**flag) as s:
        assert (await s.chat(user("What?", data_url()))).status_code == 200
        (header,) = s.encoder.calls
        assert header.overrides.background == sent


async def test_without_a_background_items_are_named_as_ever():
    async with stack(image_background="none") as s, stack() as other:
        for each in (s, other):
            assert (await each.chat(user("What?", data_url()))).status_code == 200
        (header,), (white,) = s.encoder.calls, other.encoder.calls
        assert not header.overrides.HasField("background")
        settings = s.gateway.pipeline.media.layout.settings()
        data = base64.b64decode(data_url().partition(",")[2])
        none = Overrides(background=None)
        assert header.key == content_key(data, settings, none, "enc-1") != white.key


def url_of(data):
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


async def test_a_picture_of_too_much_work_is_refused_and_reaches_no_encoder():
    costly = url_of(hostile.many_scans(1000))
    async with stack() as s:
        started = time.process_time()
        answer = await s.chat(user("What?", data_url(), costly))
        assert time.process_time() - started < 2  # Decoding would take a minute.
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "image_too_costly"
        assert error["param"] == "messages[0].content[1].image_url.url"
        assert "baseline JPEG" in error["message"] and not s.encoder.calls
    async with stack(max_decode_passes=2**40) as s:
        assert (await s.chat(user("What?", costly))).status_code == 200


async def test_a_small_picture_passes_heavy_ones_that_fill_the_encoder():
    """Three of one request, of which the encoder finishes none."""
    heavy = [data_url((shade, 0, 0), (3000, 2000)) for shade in range(3)]
    may_go = asyncio.Event()

    async def hold_heavy(encoder):
        if encoder.calls[-1].plan.width > 1000:
            await may_go.wait()

    async with stack() as s:
        (worker,) = s.gateway.pipeline.encoders.pool.workers
        s.encoder.max_batch_patches = 16  # Nothing fits beside a picture.
        await until(lambda: worker.description.max_cost_in_flight == 16)
        s.encoder.script = hold_heavy
        attack = asyncio.create_task(s.chat(user("What?", *heavy)))
        await until(lambda: s.encoder.running)
        for side in (56, 60, 84):
            answer = await s.chat(user("What?", data_url("blue", (side, side))))
            assert answer.status_code == 200
        assert s.encoder.running and not attack.done()
        may_go.set()
        assert (await attack).status_code == 200
        await until(s.idle)


async def test_an_encoder_that_dies_does_not_fail_the_request():
    async with stack(encoders=2) as s:
        died = []

        async def die(fake):
            if not died:
                died.append(fake)
                await fake.die()

        for encoder in s.encoders:
            encoder.script = die
        assert (await s.chat(user("What?", data_url()))).status_code == 200
        assert died


async def test_rows_that_were_lost_are_encoded_again():
    async with stack() as s:
        s.llm.asks_again = 2
        assert (await s.chat(user("What?", data_url()))).status_code == 200
        assert len(s.encoder.calls) == 3


async def test_an_llm_that_dies_in_mid_stream_is_continued_without_a_seam():
    text = "The quick brown fox jumps over the lazy dog."
    async with stack(llms=2, tokens=[*ids(text), END]) as s:
        died = []

        async def die(fake, index):
            if index == 9 and not died:
                died.append(fake)
                await fake.die()

        for llm in s.llms:
            llm.step = die
        *chunks, done = events((await s.chat(user("What?", data_url()), stream=True)).text)
        got = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert (got, done) == (text, "[DONE]")
        await until(s.idle)


async def test_bad_media_from_the_encoder_is_a_400_that_names_the_picture():
    async def refuse(_):
        raise InvalidMedia("the picture's data are cut short")

    for stream in (False, True):
        async with stack() as s:
            s.encoder.script = refuse
            answer = await s.chat(user("What?", data_url()), stream=stream)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["code"] == "invalid_media"
            assert error["param"] == "messages[0].content[0].image_url.url"
            await until(s.idle)


async def test_an_encoder_that_takes_no_such_size_names_the_picture():
    async def refuse(_):
        raise PayloadTooLarge("the item has too many bytes")

    async with stack() as s:
        s.encoder.script = refuse
        answer = await s.chat(user("What?", data_url()))
        assert answer.status_code == 413
        assert answer.json()["error"]["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("at", [0, 1])
async def test_rows_that_fail_at_the_llm_name_the_picture_and_not_its_key(at):
    async def lose(fake, index):
        if index == at:
            raise EmbeddingCorrupt("damaged", param=fake.starts[0].items[1].key)

    async with stack() as s:
        s.llm.step = lose
        answer = await s.chat(user("Which?", data_url("red"), data_url("blue")), stream=at > 0)
        error = answer.json()["error"] if at == 0 else events(answer.text)[-2]["error"]
        assert error["code"] == "embedding_unavailable"
        assert error["param"] == "messages[0].content[1].image_url.url"
        assert s.llm.starts[0].items[1].key not in answer.text


def pictures_of(client, count=3):
    """Pictures that no other client sends."""
    return [data_url((client, number, 7)) for number in range(count)]


@pytest.mark.slow
async def test_a_burst_of_pictures_waits_in_order_and_none_is_refused():
    async def small_queue(fake):
        if fake.running > 8:
            raise Overloaded("the encoder's queue is full", retry_after_s=0.1)
        await asyncio.sleep(0.002)

    async with stack() as s:
        s.encoder.max_batch_patches, s.encoder.patches_per_s = 72, 1e6  # Two of these pictures.
        pool = s.gateway.pipeline.encoders.pool
        await until(lambda: pool.workers[0].description.max_cost_in_flight == 216)
        go = asyncio.Event()
        s.encoder.script = lambda _: go.wait()
        async with contextlib.AsyncExitStack() as exits:
            tasks = [
                asyncio.create_task(s.chat(user("?", *pictures_of(client)))) for client in range(64)
            ]
            exits.callback(go.set)
            await until(lambda: len(pool.dispatcher.waiting) == 64 * 3 - 6, 120)
            text = await s.chat(user("Text does not wait behind pictures."))
            assert text.status_code == 200
            s.encoder.script = small_queue
        answers = await asyncio.gather(*tasks)
        assert {answer.status_code for answer in answers} == {200}
        assert s.encoder.most_running == 6
        assert len({call.key for call in s.encoder.calls}) == len(s.encoder.calls) == 64 * 3
        places: dict[str, list[int]] = {}
        for place, call in enumerate(s.encoder.calls):
            places.setdefault(call.request_id, []).append(place)
        # Requests are encoded one after the other; the six calls under way arrive in any order.
        assert all(own[-1] < 3 * (rank + 1) + 6 for rank, own in enumerate(places.values()))
        await until(s.idle)


async def test_a_request_that_waits_for_an_encoder_holds_its_pictures_and_no_body():
    go = asyncio.Event()
    async with stack() as s:
        s.encoder.script = lambda _: go.wait()
        url = data_url()
        task = asyncio.create_task(s.chat(user("?", url)))
        await until(lambda: s.encoder.running)
        assert s.gateway.admission.bytes.held == len(base64.b64decode(url.partition(",")[2]))
        go.set()
        assert (await task).status_code == 200


async def test_an_encoder_of_unknown_speed_gets_one_batch_at_a_time():
    async with stack() as s:
        s.encoder.max_batch_patches = 72
        pool = s.gateway.pipeline.encoders.pool
        await until(lambda: pool.workers[0].description.max_cost_in_flight == 72)


async def test_pictures_that_wait_leave_places_to_text():
    go = asyncio.Event()
    async with stack(max_concurrent_requests=8) as s:
        s.encoder.script = lambda _: go.wait()
        tasks = [
            asyncio.create_task(s.chat(user("?", *pictures_of(client)))) for client in range(8)
        ]
        await until(lambda: sum(task.done() for task in tasks) == 2)
        assert (await s.chat(user("Is there a place?"))).status_code == 200
        go.set()
        codes = [answer.status_code for answer in await asyncio.gather(*tasks)]
        assert sorted(codes) == [200] * 6 + [429] * 2
        await until(s.idle)


@pytest.mark.slow
async def test_what_would_wait_too_long_is_refused_and_who_leaves_encodes_nothing():
    go = asyncio.Event()
    async with stack(max_encode_wait_s=20.0, max_concurrent_requests=300) as s:
        s.encoder.max_batch_patches, s.encoder.patches_per_s = 72, 360.0  # Ten pictures a second.
        pool = s.gateway.pipeline.encoders.pool
        await until(
            lambda: (
                pool.workers[0].cost_per_s and pool.workers[0].description.max_cost_in_flight == 216
            )
        )
        s.encoder.script = lambda _: go.wait()
        tasks = [
            asyncio.create_task(s.chat(user("?", *pictures_of(client)))) for client in range(200)
        ]
        await until(  # Until each is refused, or its pictures wait or are with the encoder.
            lambda: (
                (
                    len(pool.dispatcher.waiting) + s.encoder.running
                    == 3 * sum(not task.done() for task in tasks)
                )
                and s.encoder.running == 6
            ),
            120,
        )
        refused = [task.result() for task in tasks if task.done()]
        assert {answer.status_code for answer in refused} == {429}
        assert all(1 <= int(answer.headers["retry-after"]) <= 3 for answer in refused)
        waiting = [task for task in tasks if not task.done()]
        assert len(waiting) + len(refused) == 200
        leaving, staying = waiting[10:40], waiting[:10] + waiting[40:]
        for task in leaving:
            task.cancel()
        await until(lambda: len(pool.dispatcher.waiting) == 3 * len(staying) - 6)
        go.set()
        assert {answer.status_code for answer in await asyncio.gather(*staying)} == {200}
        assert len(s.encoder.calls) == 3 * len(staying)
        again = await s.chat(user("?", *pictures_of(0)))  # Known by reference: never refused.
        assert again.status_code == 200
        await until(s.idle)


async def test_what_would_wait_too_long_is_refused_before_it_is_rendered(monkeypatch):
    go, rendered = asyncio.Event(), []
    async with stack(max_encode_wait_s=1.0) as s:
        s.encoder.patches_per_s = 1.0  # A picture takes many seconds.
        worker = s.gateway.pipeline.encoders.pool.workers[0]
        worker.wake.set()
        await until(lambda: worker.cost_per_s)
        s.encoder.script = lambda _: go.wait()
        renderer = s.gateway.pipeline.renderer

        def render(*given, render=renderer.render):
            rendered.append(given)
            return render(*given)

        monkeypatch.setattr(renderer, "render", render)
        first = asyncio.create_task(s.chat(user("What?", data_url("red"))))
        await until(lambda: s.encoder.running)
        refused = await s.chat(user("What?", data_url("green")))
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 1
        assert len(rendered) == 1
        go.set()
        assert (await first).status_code == 200
        assert (await s.chat(user("And now?", data_url("red")))).status_code == 200
        await until(s.idle)


async def test_low_detail_asks_the_encoder_for_less():
    low = {"type": "image_url", "image_url": {"url": data_url("red", (900, 900)), "detail": "low"}}
    async with stack() as s:
        s.gateway.pipeline.media.layout.max_pixels = 2**22
        await s.chat({"role": "user", "content": [low, {"type": "text", "text": "What?"}]})
        call = s.encoder.calls[0]
        assert call.overrides.max_pixels == 512 * 512
        assert call.plan.resized_width * call.plan.resized_height <= 512 * 512


async def test_too_many_pictures():
    async with stack(max_images=2) as s:
        answer = await s.chat(user("What?", *[data_url()] * 3))
        assert answer.status_code == 400 and not s.encoder.calls
        assert "2" in answer.json()["error"]["message"]


async def test_apply_template_needs_no_worker():
    async with stack(encoders=0, llms=0, ready=False) as s:
        asked = {"messages": [user("What?", data_url(size=(112, 56)))]}
        told = (await s.client.post("/v1/apply_template/", json=asked)).json()
        (span,) = told["spans"]
        assert span["num_tokens"] == 15 and span["grid_thw"] == [1, 6, 10]
        pads = told["token_ids"][span["token_offset"] : span["token_offset"] + 15]
        assert len(set(pads)) == 1 and told["prompt"].count("<|image_pad|>") == 1


async def test_a_picture_of_many_pieces_keeps_no_other_request_waiting(monkeypatch):
    """A quarter of a second each to walk, of which the event loop spends none."""
    plain = hostile.many_scans(0, (64, 64))
    end = plain.rindex(b"\xff\xd9")
    pieces = plain[:end] + b"\xff\xe1\x00\x02" * 50_000 + plain[end:]
    threads = []
    parse = media.parse_structure

    def spy(data, *limits):
        threads.append(threading.current_thread())
        return parse(data, *limits)

    monkeypatch.setattr(media, "parse_structure", spy)
    async with stack() as s:
        assert (await s.chat(user("What?", url_of(pieces)))).status_code == 200
    assert threads and threading.main_thread() not in threads
