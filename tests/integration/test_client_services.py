"""The Python client with real processes: the demo checkpoint's encoder and LLM, no gateway."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

import opticnerve.client
import opticnerve.demo
from opticnerve.client import EncoderClient, LLMClient, MultiMediaInfo, Sampling, Tensors
from opticnerve.embeddings.ref import Location
from opticnerve.errors import EmbeddingUnavailable, InvalidMedia, InvalidRequest
from tests.services import Process, process
from tests.system import wait_for

pytestmark = pytest.mark.process
DEMO = Path(opticnerve.demo.__file__).parent / "checkpoint"
PAD = 632
ROOT = Path(__file__).parents[2]
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    "{}<|vision_end|>Describe the picture.<|im_end|>\n<|im_start|>assistant\n"
)
SAMPLING = Sampling(max_tokens=40)


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


def examples() -> list[str]:
    """The example of ``opticnerve.client``, and those that docs/clients.md shows of it."""
    document = opticnerve.client.__doc__ or ""
    indented = [line for line in document.splitlines() if not line or line.startswith("    ")]
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs/clients.md").read_text(), re.DOTALL)
    return [
        textwrap.dedent("\n".join(indented)),
        *(text for text in shown if "from opticnerve.client import" in text),
    ]


@pytest.mark.parametrize("example", examples())
def test_the_example_runs_as_it_is_shown(
    example: str,
    services: tuple[Process, Process],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    for port, service in zip((7001, 7002), services, strict=True):
        assert f'"127.0.0.1:{port}"' in example
        example = example.replace(f"127.0.0.1:{port}", service.address)
    exec(compile(example, "example", "exec"), {})
    assert capsys.readouterr().out == "A large red star in the center.\n"


def test_an_answer_ends_at_the_end_of_the_turn(
    clients: tuple[EncoderClient, LLMClient], tokenizer: Tokenizer
) -> None:
    llm = clients[1]
    assert list(llm.describe().eos_token_ids) == [tokenizer.token_to_id("<|im_end|>")]
    contents = {PAD: scene("red")}
    ids = prompt(tokenizer, 9)
    choice = llm.generate(ids, contents, Sampling(max_tokens=60)).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.stop_token_id == choice.token_ids[-1] == tokenizer.token_to_id("<|im_end|>")
    on = llm.generate(ids, contents, Sampling(max_tokens=60, eos_token_ids=())).choices[0]
    assert on.finish_reason == "length" and len(on.token_ids) == 60
    assert on.token_ids[: len(choice.token_ids)] == choice.token_ids


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
