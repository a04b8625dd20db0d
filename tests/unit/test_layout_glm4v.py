"""GLM-4V's layout: its own sizes, and every form of its configuration."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import InvalidMedia, UnsupportedCheckpoint
from opticnerve.media.plan import Modality, Overrides, Structure
from opticnerve.models import registry
from tests.checkpoints import make_checkpoint
from tests.families import samples
from tests.reference import CAUSAL, load_reference, picture


def layout_of(path: Path) -> Any:
    return registry.make_layout(Checkpoint.open(str(path)))


def changed(path: Path, file: str, edit: Any) -> Path:
    content = json.loads((path / file).read_text())
    edit(content)
    (path / file).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("bounds", [(2 * 28 * 28, 40000), (112 * 112, 28 * 28 * 15000)])
def test_sizes_are_those_of_the_reference(bounds: tuple[int, int], tmp_path: Path) -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

    path = make_checkpoint("glm4v", tmp_path)
    size = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    layout = layout_of(changed(path, "preprocessor_config.json", lambda c: c.update(size=size)))
    rng = random.Random(4)
    tops = (30, 300, 5000)
    drawn = [(rng.randint(1, top), rng.randint(1, top)) for top in tops for _ in range(300)]
    sizes = [size for size in drawn if max(size) <= 190 * min(size)]
    for width, height in [*sizes, (1, 1), (200, 1), (1, 200), (5600, 28)]:
        expected = smart_resize(2, height, width, 2, 28, *bounds)
        plan = layout.plan(Structure("png", width, height))
        assert (plan.resized_height, plan.resized_width) == expected, (width, height)


def test_long_pictures_are_refused(tmp_path: Path) -> None:
    layout = layout_of(make_checkpoint("glm4v", tmp_path))
    with pytest.raises(InvalidMedia, match="4001x20"):
        layout.plan(Structure("png", 4001, 20))


def test_a_requests_bounds_are_of_the_picture(tmp_path: Path) -> None:
    """The image processor's own count both frames of a still picture."""
    layout = layout_of(make_checkpoint("glm4v", tmp_path))
    assert (layout.min_pixels, layout.max_pixels) == (56 * 56 // 2, 64 * 28 * 28 // 2)
    plan = layout.plan(Structure("png", 600, 600), Overrides(min_pixels=100, max_pixels=10_000))
    assert 5_000 < plan.resized_width * plan.resized_height <= 10_000


@pytest.mark.parametrize(
    ("kind", "sizes", "image"),
    [("glm4v", (4096, 32768), 151343), ("glm4v_moe", (4096, 65536), 151363)],
)
def test_defaults_are_those_of_the_reference(
    kind: str, sizes: tuple[int, int], image: int, tmp_path: Path
) -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    def strip(config: dict[str, Any]) -> None:
        for name in ("hidden_size", "max_position_embeddings"):
            del config["text_config"][name]
        del config["image_token_id"], config["vision_config"]["patch_size"]

    path = changed(make_checkpoint(kind, tmp_path), "config.json", strip)
    layout = layout_of(changed(path, "preprocessor_config.json", lambda c: c.pop("size")))
    assert (layout.hidden_size, layout.max_positions) == sizes
    assert layout.item_token_ids == {Modality.IMAGE: image}
    size = Glm4vImageProcessorPil().size
    assert 2 * layout.min_pixels == size["shortest_edge"]
    assert 2 * layout.max_pixels == size["longest_edge"]
    assert layout.patch_size == 14


def test_markers_and_the_video_token_are_placeholders(tmp_path: Path) -> None:
    layout = layout_of(make_checkpoint("glm4v", tmp_path))
    assert set(layout.placeholder_ids) == {
        "image_token",
        "image_start_token",
        "image_end_token",
        "video_token",
        "video_start_token",
        "video_end_token",
    }


@pytest.mark.parametrize("kind", ["glm4v", "glm4v_moe"])
def test_a_checkpoint_may_name_its_parts_kinds_alone(kind: str, tmp_path: Path) -> None:
    """GLM-4.6V's own model_type, over either model."""
    path = changed(
        make_checkpoint(kind, tmp_path),
        "config.json",
        lambda c: c.update(model_type="glm46v", architectures=["Glm46VForConditionalGeneration"]),
    )
    checkpoint, reference = Checkpoint.open(str(path)), load_reference(path)
    layout, sample = layout_of(path), samples()[kind]
    plan, image = layout.plan(Structure("png", 100, 80)), picture(100, 80)
    pixels = registry.make_preprocessor(checkpoint, layout)(image, plan)
    [item] = registry.load_tower(checkpoint, "float32", "cpu").encode([pixels], [plan])
    inputs = sample.image_inputs(sample.image_processor(path), [image])
    expected = sample.rows(reference, inputs)["rows"]
    torch.testing.assert_close(item["rows"], expected, rtol=0, atol=1e-4)
    language = registry.load_language(checkpoint, "float32", "cpu", CAUSAL)
    ids = torch.arange(9)
    with torch.inference_mode():
        positions = ids.expand(3, -1)
        logits = language.logits(language.forward(language.embed(ids), positions))
        torch.testing.assert_close(logits, reference(ids[None]).logits[0], rtol=0, atol=1e-4)


def test_parts_of_other_models_are_refused(tmp_path: Path) -> None:
    path = changed(
        make_checkpoint("glm4v", tmp_path),
        "config.json",
        lambda c: c.update(model_type="glm46v", text_config={"model_type": "llama"}),
    )
    with pytest.raises(UnsupportedCheckpoint, match="'llama'"):
        registry.load_language(Checkpoint.open(str(path)), "float32", "cpu", CAUSAL)
