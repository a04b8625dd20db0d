"""Pictures through the gateway: sent once, named, encoded again when lost."""

import base64

import pytest

from opticnerve.errors import EmbeddingCorrupt, InvalidMedia, Overloaded, PayloadTooLarge
from tests.fakes import until
from tests.gateways import END, data_url, events, ids, stack, user

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_loop")]


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
        again = await s.chat(user("And now?", red), headers={"x-opticnerve-timings": "1"})
        timings = again.json()["timings"]
        assert timings["bytes_to_encoders"] == 0
        assert timings["items"] == [{"cached": "ref", "bytes_sent": 0}]
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


async def test_full_encoders_are_a_429_with_retry_after():
    async def full(_):
        raise Overloaded("the queue is full", retry_after_s=3)

    async with stack() as s:
        s.encoder.script = full
        answer = await s.chat(user("What?", data_url()))
        assert answer.status_code == 429 and answer.headers["retry-after"] == "3"


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
