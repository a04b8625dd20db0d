"""The Python client with real processes: the demo checkpoint's encoder and LLM, no gateway."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

import opticnerve.demo
from opticnerve.client import EncoderClient, LLMClient, MultiMediaInfo, Sampling, Tensors
from opticnerve.embeddings.ref import Location
from opticnerve.errors import EmbeddingUnavailable, InvalidMedia, InvalidRequest
from tests.services import Process, process
from tests.system import wait_for

DEMO = Path(opticnerve.demo.__file__).parent / "checkpoint"
PAD, EOS = 632, 629
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    "{}<|vision_end|>Describe the picture.<|im_end|>\n<|im_start|>assistant\n"
)
SAMPLING = Sampling(max_tokens=40, eos_token_ids=(EOS,))


def scene(color: str) -> Image.Image:
    image = Image.new("RGB", (336, 336), "white")
    ImageDraw.Draw(image).rectangle((20, 20, 110, 110), fill=color)
    return image


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    store = f"shm://{tmp_path_factory.mktemp('store') / 'tier'}"
    encoder = Process("encoder_service", "--store", store, "--dtype", "float32")
    with (
        process("llm_service", "--store", store, "--dtype", "float32") as llm,
        encoder.until_ready() as ready,
    ):
        yield ready, llm


@pytest.fixture(scope="module")
def clients(services: tuple[Process, Process]) -> Iterator[tuple[EncoderClient, LLMClient]]:
    with (
        EncoderClient(services[0].address) as encoder,
        LLMClient(services[1].address, encoder=encoder, timeout_s=100) as llm,
    ):
        yield encoder, llm


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def prompt(tokenizer: Tokenizer, rows: int) -> list[int]:
    text = PROMPT.format("<|image_pad|>" * rows)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_a_picture_a_reference_and_own_tensors_give_one_answer(
    clients: tuple[EncoderClient, LLMClient], tokenizer: Tokenizer
) -> None:
    encoder, llm = clients
    answers = {}
    for color in ((214, 40, 40), (33, 102, 212)):
        picture = scene(f"rgb{color}")
        ref = encoder.encode(picture)
        assert ref.plan is not None
        ids = prompt(tokenizer, ref.num_rows)
        own = Tensors(encoder.fetch(ref)["rows"], grid=ref.plan.grid)
        texts = [
            tokenizer.decode(
                list(llm.generate(ids, MultiMediaInfo({PAD: [content]}), SAMPLING).token_ids)
            )
            for content in (ref, picture, own)
        ]
        assert len(set(texts)) == 1
        answers[color] = texts[0]
    assert "red square" in answers[(214, 40, 40)]
    assert "blue square" in answers[(33, 102, 212)]


def test_leaving_a_stream_frees_what_it_held(
    clients: tuple[EncoderClient, LLMClient], tokenizer: Tokenizer
) -> None:
    llm = clients[1]
    ids = prompt(tokenizer, 9)
    endless = Sampling(max_tokens=4000, ignore_eos=True)
    for delta in llm.stream(ids, MultiMediaInfo({PAD: [scene("red")]}), endless):
        assert delta.token_ids
        break
    wait_for("the end of the sequence", lambda: not llm.describe().load.running)


def test_errors_arrive_typed_and_the_next_request_works(
    clients: tuple[EncoderClient, LLMClient], tokenizer: Tokenizer
) -> None:
    encoder, llm = clients
    ids = prompt(tokenizer, 9)
    with pytest.raises(InvalidMedia):
        encoder.encode(b"no picture")
    ref = encoder.encode(scene("black"))
    nowhere = replace(ref, key="0" * 64, location=Location(shm_tier_id="another tier"))
    fresh = [1, *ids]  # A prompt whose prefix no cache holds.
    with pytest.raises(EmbeddingUnavailable):
        llm.generate(fresh, MultiMediaInfo({PAD: [nowhere]}), SAMPLING)
    rows = encoder.fetch(ref)["rows"]
    with pytest.raises(InvalidRequest, match="grid"):
        llm.generate(ids, MultiMediaInfo({PAD: [rows]}), SAMPLING)
    answer = llm.generate(ids, MultiMediaInfo({PAD: [ref]}), SAMPLING)
    assert answer.choices[0].finish_reason == "stop"
