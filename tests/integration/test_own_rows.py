"""Rows that a caller brings itself: its answer is theirs, and nobody else's picture is changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.embeddings import codec
from opticnerve.embeddings.open import open_store
from opticnerve.embeddings.ref import Location, tensors_key
from opticnerve.embeddings.shm_store import ShmStore
from opticnerve.errors import InvalidRequest
from opticnerve.media.plan import Overrides, Structure
from tests import encoders, llms
from tests.encoders import FakeBackend
from tests.fakes import until
from tests.integration.test_damage import ask, gateway
from tests.integration.test_llm_service import TOKENS, demo, serve
from tests.llms import Demo, Picture, Prompt, Worker, next_message, read, ready

__all__ = ["demo", "serve"]  # Fixtures.
pytestmark = pytest.mark.slow


def attack(demo: Demo, victim: Picture, seed: int = 99) -> Picture:
    """Rows of another picture, under the key of ``victim``'s."""
    return replace(demo.picture(seed), key=victim.key)


def own(picture: Picture) -> Picture:
    """Under the key that its rows have of themselves."""
    return replace(picture, key=tensors_key(picture.data()))


def inline(picture: Picture) -> Any:
    return picture.ref(Location(inline=picture.data()))


def files(worker: Worker) -> list[str]:
    assert isinstance(worker.store, ShmStore)
    return [path.name for path in worker.store.directory.glob("*.safetensors")]


async def nothing_is_left(worker: Worker) -> None:
    fetcher = worker.loaded.fetcher
    await until(
        lambda: (
            not files(worker) and not any(store.stored_bytes() for store in fetcher._rows.stores)
        )
    )
    assert not fetcher._holders


def test_rows_under_the_key_of_a_picture_are_not_that_pictures(
    demo: Demo, serve: Callable[..., None]
) -> None:
    """Neither in the tier nor in the prefix cache, during the caller's request and after it."""
    picture = demo.picture(9)
    planted = attack(demo, picture)
    prompts = [demo.prompt(6, picture, 30, seed=seed) for seed in (8, 10)]
    attacks = [replace(prompt, pictures=[planted]) for prompt in prompts]
    for prompt, mine in zip(prompts, attacks, strict=True):
        assert demo.reference(prompt, TOKENS) != demo.reference(mine, TOKENS)

    async def victim(worker: Worker, prompt: Prompt) -> None:
        call = await worker.open(prompt.start([picture.ref(worker.here())]))
        assert (await next_message(call)).needed == [(picture.key, "EVICTED")]
        await call.write(ready(worker.put(picture)))
        answer = await read(call)
        assert answer.tokens[0] == demo.reference(prompt, TOKENS)
        worker.store.delete(picture.key)

    async def body(worker: Worker) -> None:
        long = {"sampling": {"max_tokens": 900, "ignore_eos": True}}
        held = await worker.open(attacks[0].start([inline(planted)], **long))
        assert not (await next_message(held)).needed
        assert f"{picture.key}.safetensors" not in files(worker)
        await victim(worker, prompts[0])
        held.cancel()
        answer = await worker.generate(attacks[1].start([inline(planted)]))
        assert answer.tokens[0] == demo.reference(attacks[1], TOKENS)
        await victim(worker, prompts[1])
        await nothing_is_left(worker)

    serve(body)


def test_rows_that_come_later_are_announced_and_named_by_their_bytes(
    demo: Demo, serve: Callable[..., None]
) -> None:
    picture, other = own(demo.picture(9)), demo.picture(10)
    prompt = demo.prompt(6, picture, 5, seed=8)

    async def body(worker: Worker) -> None:
        start = prompt.start()
        start.start.items[0].own = True
        answer = await worker.generate(start, ready(inline(picture)))
        assert answer.tokens[0] == demo.reference(prompt, TOKENS)
        with pytest.raises(InvalidRequest, match="SHA-256"):
            await worker.generate(start, ready(inline(replace(other, key=picture.key))))
        with pytest.raises(InvalidRequest, match="must be marked own=true in Start"):
            await worker.generate(start, ready(picture.ref(worker.here())))
        for key in (picture.key, other.key):
            unannounced = demo.prompt(6, replace(other, key=key), 5)
            with pytest.raises(InvalidRequest, match="must be marked own=true in Start"):
                await worker.generate(unannounced.start(), ready(inline(replace(other, key=key))))
        await nothing_is_left(worker)

    serve(body)


def test_equal_rows_share_their_prefix_and_others_under_the_same_key_do_not(
    demo: Demo, serve: Callable[..., None]
) -> None:
    picture = own(demo.picture(9))
    prompt = demo.prompt(6, picture, 40, seed=8)
    theirs = replace(prompt, pictures=[attack(demo, picture)])

    async def body(worker: Worker) -> None:
        for asked, cached in ((prompt, False), (prompt, True), (theirs, False), (prompt, True)):
            answer = await worker.generate(asked.start([inline(asked.pictures[0])]))
            assert answer.tokens[0] == demo.reference(asked, TOKENS)
            assert answer.done is not None
            assert (answer.done.usage.cached_tokens > 0) is cached

    serve(body)


@pytest.mark.process
def test_an_engine_elsewhere_finds_them_in_the_tier_under_no_key_of_the_callers(
    demo: Demo, serve: Callable[..., None]
) -> None:
    """And of many who bring the same rows none loses them to another's end."""
    picture = demo.picture(9)
    prompt = demo.prompt(6, picture, 5, seed=8)
    want = demo.reference(prompt, TOKENS)

    async def body(worker: Worker) -> None:
        starts = [prompt.start([inline(picture)]) for _ in range(24)]
        answers = await asyncio.gather(*map(worker.generate, starts))
        assert [answer.tokens[0] for answer in answers] == [want] * len(starts)
        await nothing_is_left(worker)
        long = {"sampling": {"max_tokens": 900, "ignore_eos": True}}
        held = await worker.open(prompt.start([inline(picture)], **long))
        assert not (await next_message(held)).needed
        assert len(files(worker)) == 1 and f"{picture.key}.safetensors" not in files(worker)
        held.cancel()
        await nothing_is_left(worker)

    serve(body, engine="process", max_num_seqs=2, no_prefix_caching=True)


def test_a_callers_key_is_what_it_hears(demo: Demo, serve: Callable[..., None]) -> None:
    picture = demo.picture(9)
    prompt = demo.prompt(6, picture, 5)

    async def body(worker: Worker) -> None:
        damaged = picture.ref(Location(inline=picture.data()[:-1]))
        call = await worker.open(prompt.start([damaged]))
        assert (await next_message(call)).needed == [(picture.key, "CORRUPT")]
        start = prompt.start([damaged], embedding_wait_ms=1)
        with pytest.raises(Exception, match="embedding") as caught:
            await worker.generate(start)
        assert caught.value.param == picture.key  # type: ignore[attr-defined]
        call.cancel()

    serve(body)


def test_another_users_picture_keeps_its_own_rows_through_all_services(tmp_path: Path) -> None:
    """Encoder and LLM worker share a tier; the attacker has only the LLM worker's port."""

    async def scenario() -> None:
        url = f"shm://{tmp_path}/tier"
        async with (
            asyncio.timeout(250),
            encoders.running(
                tmp_path,
                backend=FakeBackend(hidden_size=192),
                store=open_store(url),
                pair_id=Checkpoint.open(None).pair_id,
            ) as encoder,
            llms.running(tmp_path / "llm", store=url) as llm,
        ):
            async with gateway(encoder, llm) as client:
                first = await ask(client)
            (name,) = files(llm)
            path = tmp_path / "tier" / name
            good = path.read_bytes()
            path.unlink()

            plan = encoder.encoder.model.layout.plan(Structure("png", 56, 56), Overrides())
            tensors, _ = codec.from_bytes(good)
            rows = {each: torch.full_like(tensor, 7.0) for each, tensor in tensors.items()}
            planted = Picture(name.partition(".")[0], plan, None, rows)  # type: ignore[arg-type]
            prompt = llms.Demo().prompt(3, planted, 3)
            await llm.generate(prompt.start([inline(planted)]))

            async with gateway(encoder, llm) as client:
                assert await ask(client) == first
            assert path.read_bytes() == good and encoder.encoder.encoded_items == 2
            assert files(llm) == [name]

    asyncio.run(scenario())
