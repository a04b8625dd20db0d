"""What every declared family promises. Families are discovered: a new one is tested unseen, once
``tests.checkpoints`` can write a small checkpoint of it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gateway.job import TextPrompt, TokenPrompt
from gateway.prompt import placeholders
from gateway.prompt.completion_prompt import read_plain
from gateway.prompt.renderer import ChatRenderer
from opticnerve import models
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import FamilyError, InvalidRequest, PlanMismatch, UnsupportedCheckpoint
from opticnerve.media.plan import Modality, Overrides, Structure
from opticnerve.models import registry
from opticnerve.models.family import Family, wanted
from tests.checkpoints import FAMILIES, LAYOUTS
from tests.families import Sample, samples
from tests.reference import CAUSAL, picture, place

DECLARED = sorted(set(registry.families().values()), key=lambda family: family.name)
SIZES = [(56, 56), (100, 80), (57, 201), (300, 200)]


@pytest.fixture(scope="module", params=FAMILIES)
def sample(request: pytest.FixtureRequest) -> Sample:
    return samples()[request.param]


@pytest.fixture(scope="module")
def family(sample: Sample) -> Family:
    return next(family for family in DECLARED if family.name == sample.family)


@pytest.fixture(scope="module")
def checkpoint(sample: Sample, random_checkpoint: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(str(random_checkpoint(sample.name)), side="encoder")


@pytest.fixture(scope="module")
def layout(checkpoint: Checkpoint) -> Any:
    return registry.make_layout(checkpoint)


@pytest.fixture(scope="module")
def tower(checkpoint: Checkpoint) -> Any:
    return registry.load_tower(checkpoint, "float32", "cpu")


@pytest.fixture(scope="module")
def language(checkpoint: Checkpoint) -> Any:
    return registry.load_language(checkpoint, "float32", "cpu", CAUSAL)


def test_every_family_is_tested() -> None:
    assert {family.name for family in DECLARED} == {each.family for each in samples().values()}


# ---- the declaration


def test_it_is_complete(family: Family) -> None:
    assert family.title and family.model_types
    folder = Path(next(iter(models.__path__))) / family.name
    for part in (family.layout, family.preprocess, family.tower, family.decoder):
        assert callable(family.load_part(part))
    for part in (family.layout, family.tower, family.decoder):
        module = part.partition(":")[0].removeprefix(".")
        assert (folder / f"{module}.py").is_file(), "parts are in the family's own folder"


@pytest.mark.process
def test_layouts_and_preprocessing_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from opticnerve.models.registry import families\n"
        "for family in families().values():\n"
        "    family.load_part(family.layout), family.load_part(family.preprocess)\n"
        "loaded = {'torch', 'transformers', 'huggingface_hub', 'grpc'} & set(sys.modules)\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("naming", LAYOUTS)
def test_every_tensor_belongs_to_one_half(
    naming: str, sample: Sample, family: Family, random_checkpoint: Callable[..., Path]
) -> None:
    """That each half takes all of its own is what loading checks."""
    path = random_checkpoint(sample.name, layout=naming)
    keys = Checkpoint.open(str(path)).tensor_index()
    is_vision, is_language = wanted(family.vision_keys), wanted(family.language_keys)
    assert {key for key in keys if is_vision(key) == is_language(key)} == set()
    assert any(map(is_vision, keys)) and any(map(is_language, keys))


# ---- the layout


def test_a_layout_describes_its_family(family: Family, layout: Any) -> None:
    assert layout.family == family.name
    assert layout.placeholder_ids["image_token"] == layout.item_token_ids[Modality.IMAGE]
    assert layout.position_dims in (1, 3)
    assert layout.max_positions > 0 and layout.deepstack_levels >= 0
    assert json.loads(json.dumps(layout.settings()))["family"] == family.name


@pytest.mark.parametrize("size", SIZES)
def test_an_expansion_has_the_tokens_that_were_planned(layout: Any, size: tuple[int, int]) -> None:
    plan = layout.plan(Structure("png", *size))
    expansion = layout.expand(plan)
    places = [run.offset + i for run in expansion.runs for i in range(run.num_tokens)]
    rows = [run.row_start + i for run in expansion.runs for i in range(run.num_tokens)]
    assert rows == list(range(plan.num_tokens))
    assert all(one < other for one, other in pairwise(places))
    overwritten = layout.item_token_ids[plan.modality]
    assert [i for i, token in enumerate(expansion.token_ids) if token == overwritten] == places


def test_ids_of_any_size_are_those_of_the_processor(
    sample: Sample, checkpoint: Checkpoint, layout: Any
) -> None:
    """From structure alone: what a template writes for a picture becomes what Hugging Face's
    processor makes of it."""
    processor = sample.processor(checkpoint.path)
    name = "image_token" if layout.rewrite is None else layout.rewrite.written
    written = layout.placeholder_ids[name]
    text = processor.tokenizer.decode([written], skip_special_tokens=False)
    tokenizer = ChatRenderer.load(checkpoint.path, layout).tokenizer
    placed = tokenizer.encode(placeholders.picture_text(layout, tokenizer))
    random = np.random.default_rng(5)
    for width, height in random.integers(4, 500, (200, 2)).tolist():
        inputs = sample.process(processor, text, [Image.new("RGB", (width, height))])
        ids = tuple(inputs["input_ids"][0].tolist())
        plan = layout.plan(Structure("png", width, height))
        expected = placeholders.expand(layout, text, placed, [plan], 2**20).token_ids
        start = len(ids) - len(expected)  # A beginning-of-sequence token may stand in front.
        assert start in (0, 1) and ids[start:] == expected, (width, height)


@pytest.mark.parametrize("size", SIZES)
def test_no_text_may_become_a_token_of_an_expansion(
    checkpoint: Checkpoint, layout: Any, size: tuple[int, int]
) -> None:
    """In prompts without pictures, placeholders and the special tokens around them are text."""
    tokenizer = ChatRenderer.load(checkpoint.path, layout).tokenizer
    placed = tokenizer.encode(placeholders.picture_text(layout, tokenizer))
    plan = layout.plan(Structure("png", *size))
    ids = set(placeholders.expand(layout, "", placed, [plan], 2**20).token_ids)
    entries = json.loads((checkpoint.path / "tokenizer.json").read_text())["added_tokens"]
    special = {entry["id"]: entry["content"] for entry in entries if entry["special"]}
    assert ids & special.keys() <= set(layout.placeholder_ids.values())
    for token_id in ids & special.keys():
        text = TextPrompt(special[token_id], add_special_tokens=False)
        assert token_id not in read_plain(text, tokenizer, layout).token_ids
        with pytest.raises(InvalidRequest, match=f"{token_id} stands for a picture"):
            read_plain(TokenPrompt((token_id,)), tokenizer, layout)


def test_bounds_that_no_picture_has_are_refused(layout: Any) -> None:
    for name in ("min_pixels", "max_pixels"):
        for bound in (0, -5):
            with pytest.raises(InvalidRequest, match=f"{name} must be at least 1") as caught:
                layout.plan(Structure("png", 300, 200), Overrides(**{name: bound}))
            assert caught.value.param == name


def test_positions_have_a_shape_and_go_on_after_the_prompt(layout: Any) -> None:
    plan = layout.plan(Structure("png", 100, 80))
    ids, spans = place(layout, plan, 3, 0)
    tokens = len(ids)
    for length, given in ((0, []), (5, []), (tokens + 6, spans)):
        positions, delta = layout.positions(length, given)
        assert positions.shape == (layout.position_dims, length)
        assert positions.dtype == np.int64 and isinstance(delta, int)
        assert (positions >= 0).all()
        assert length + delta == positions.max(initial=-1) + 1
    assert (layout.positions(5, [])[0] == np.arange(5)).all()


# ---- the vision half


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_towers_input_and_rows_are_those_planned(
    checkpoint: Checkpoint, layout: Any, tower: Any, size: tuple[int, int]
) -> None:
    preprocess = registry.make_preprocessor(checkpoint, layout)
    plan, image = layout.plan(Structure("png", *size)), picture(*size)
    pixels = preprocess(image, plan)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.shape[-1] == 3
    elsewhere = pickle.loads(pickle.dumps(preprocess))  # As for a process that decodes.
    assert np.array_equal(elsewhere(image, plan), pixels)
    [item] = tower.encode([pixels], [plan])
    assert item["rows"].shape == (plan.num_tokens, tower.hidden_size)
    assert tower.hidden_size == layout.hidden_size
    for wrong in (pixels[:-1], pixels[..., :-1, :], pixels[..., :2], pixels.astype(np.float32)):
        with pytest.raises(PlanMismatch, match="where the plan has"):
            tower.encode([wrong], [plan])


# ---- the language half


def test_a_decoder_is_declared_layer_by_layer(
    family: Family, checkpoint: Checkpoint, layout: Any, language: Any
) -> None:
    spec = family.load_part(family.decoder)(checkpoint)
    assert len(spec.layers) == language.num_layers
    assert spec.position_dims == layout.position_dims
    assert language.hidden_size == layout.hidden_size


def test_scales_and_caps_are_applied(family: Family, checkpoint: Checkpoint) -> None:
    spec = family.load_part(family.decoder)(checkpoint)
    plain, scaled = (
        replace(spec, embedding_scale=scale, logit_soft_cap=cap).load(
            checkpoint, family.language_keys, "float32", "cpu", CAUSAL
        )
        for scale, cap in ((1.0, None), (3.0, 2.0))
    )
    ids = torch.arange(5)
    with torch.inference_mode():
        rows = plain.embed(ids)
        torch.testing.assert_close(scaled.embed(ids), rows * 3)
        torch.testing.assert_close(scaled.logits(rows), 2 * torch.tanh(plain.logits(rows) / 2))


# ---- discovery


DECLARATION = """
from opticnerve.models.family import Family, wanted

FAMILY = Family(
    package=__name__,
    title="Fake-VL",
    model_types=({model_type!r},),
    layout=".layout:read",
    preprocess=".layout:read",
    tower=".tower:describe",
    decoder=".decoder:describe",
    vision_keys=(),
    language_keys=(),
)
"""


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Adds the folder of a family without towers or decoders."""

    def add(model_type: str) -> None:
        folder = tmp_path / "fake_vl"
        folder.mkdir()
        (folder / "__init__.py").write_text(DECLARATION.format(model_type=model_type))
        (folder / "layout.py").write_text("def read(checkpoint): return checkpoint.config['a']\n")
        monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
        registry.discover.cache_clear()

    yield add
    registry.discover.cache_clear()
    for name in [name for name in sys.modules if name.startswith("opticnerve.models.fake_vl")]:
        del sys.modules[name]


def test_a_new_folder_is_a_family(declare: Callable[[str], None], tmp_path: Path) -> None:
    before = set(registry.families())
    declare("fake_vl_7")
    assert set(registry.families()) == before | {"fake_vl_7"}
    (tmp_path / "config.json").write_text('{"model_type": "fake_vl_7", "a": "made"}')
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.family == "fake_vl"
    assert registry.make_layout(checkpoint) == "made"
    with pytest.raises(UnsupportedCheckpoint, match=r"Fake-VL \(model_type fake_vl_7\)"):
        registry.find_family({"model_type": "other", "vision_config": {}})


def test_the_vision_towers_type_may_decide(declare: Callable[[str], None]) -> None:
    """Between a family of a model_type, and one of the same with another vision tower."""
    shared = DECLARED[0].model_types[0]
    declare(f"{shared}/fake_tower")
    for tower, name in (("fake_tower", "fake_vl"), ("other_tower", DECLARED[0].name)):
        config = {"model_type": shared, "vision_config": {"model_type": tower}}
        assert registry.find_family(config).name == name


def test_two_families_of_one_model_type_are_an_error(declare: Callable[[str], None]) -> None:
    taken = DECLARED[0].model_types[0]
    declare(taken)
    with pytest.raises(FamilyError, match=rf"model_type '{taken}': .*fake_vl") as caught:
        registry.find_family({"model_type": taken})
    assert DECLARED[0].package in caught.value.message
    assert set(registry.families()) == {
        model_type for family in DECLARED for model_type in family.model_types
    } - {taken}, "the others are served all the same"
