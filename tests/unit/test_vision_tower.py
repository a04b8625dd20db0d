"""Towers equal the unsplit model's image features, packed, in one attention call a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import CheckpointError, PlanMismatch
from opticnerve.media.plan import Grid, Modality, Plan, Structure
from opticnerve.models import registry
from opticnerve.models.qwen2_5_vl.vision import window_order
from opticnerve.models.towers import varlen
from opticnerve.models.towers.patches import PatchEmbedding, TileEmbedding, use_products
from opticnerve.models.towers.tower import position_ids
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.families import samples
from tests.reference import image_processor, image_rows, load_reference, picture

MakeCheckpoint = Callable[..., Path]

SIZES = [(100, 80), (300, 200), (57, 201), (120, 120), (28, 400), (260, 260)]


def open_side(path: Path, dtype: str = "float32") -> tuple[Any, Any, Any]:
    """Layout, preprocessor, tower."""
    checkpoint = Checkpoint.open(str(path), side="encoder")
    layout = registry.make_layout(checkpoint)
    preprocess = registry.make_preprocessor(checkpoint, layout)
    return layout, preprocess, registry.load_tower(checkpoint, dtype, "cpu")


PATCHES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]  # Families of patches of any grid.


def expect_close(rows: torch.Tensor, expected: torch.Tensor) -> None:
    """Cosine of every row at least 0.99999, difference at most 1e-4 of the largest value."""
    assert rows.shape == expected.shape
    assert F.cosine_similarity(rows, expected, dim=-1).min() >= 0.99999
    assert (rows - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_the_unsplit_model_one_by_one(
    family: str, layout: str, random_checkpoint: MakeCheckpoint
) -> None:
    path = random_checkpoint(family, layout=layout)
    sizing, preprocess, tower = open_side(path)
    reference, processor = load_reference(path), image_processor(path, family)
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    plans = [sizing.plan(Structure("png", *image.size)) for image in images]
    pixels = [preprocess(image, plan) for image, plan in zip(images, plans, strict=True)]
    encoded = tower.encode(pixels, plans)
    for image, plan, item in zip(images, plans, encoded, strict=True):
        inputs = samples()[family].image_inputs(processor, [image])
        expected = samples()[family].rows(reference, inputs)
        assert item.keys() == expected.keys()
        for name, rows in item.items():
            assert rows.shape == (plan.num_tokens, tower.hidden_size)
            assert rows.untyped_storage().nbytes() == rows.nbytes  # Not the batch's.
            expect_close(rows, expected[name])


def test_the_demo_tower_equals_the_unsplit_model() -> None:
    checkpoint = Checkpoint.open(None, side="encoder")
    sizing = registry.make_layout(checkpoint)
    preprocess = registry.make_preprocessor(checkpoint, sizing)
    tower = registry.load_tower(checkpoint, "float32", "cpu")
    reference = load_reference(checkpoint.path)
    processor = image_processor(checkpoint.path, "qwen2_vl")
    image = picture(336, 336)
    plan = sizing.plan(Structure("png", 336, 336))
    [item] = tower.encode([preprocess(image, plan)], [plan])
    expected = image_rows(reference, "qwen2_vl", processor(image, return_tensors="pt"))
    expect_close(item["rows"], expected)


@pytest.mark.parametrize("family", PATCHES)
def test_frames_of_a_video_attend_within_themselves(
    family: str, random_checkpoint: MakeCheckpoint
) -> None:
    path = random_checkpoint(family)
    _, _, tower = open_side(path)
    reference = load_reference(path)
    grids = [Grid(3, 6, 10), Grid(1, 4, 4), Grid(2, 14, 6)]
    side = tower.patch_size
    patches = torch.randn(sum(g.num_patches for g in grids), 2, side, side, 3)
    theirs = patches.permute(0, 4, 1, 2, 3).flatten(1)
    with torch.inference_mode():
        rows = tower.forward(patches, grids)["rows"]
        sizes = torch.tensor([(g.t, g.h, g.w) for g in grids])
        features = reference.model.get_video_features(theirs, sizes).pooler_output
    expect_close(rows, torch.cat(tuple(features)))


@pytest.mark.parametrize("family", [*PATCHES, "paddleocr_vl"])
def test_attention_is_called_once_a_layer_and_never_over_the_whole_batch(
    family: str, random_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, tower = open_side(random_checkpoint(family))
    calls: list[int] = []
    lengths: list[int] = []

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return varlen.attend(module, *args, **kwargs)

    attention = F.scaled_dot_product_attention

    def measured(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(query.shape[-2])
        return attention(query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, varlen.NAME, counted)
    monkeypatch.setattr(varlen.F, "scaled_dot_product_attention", measured)
    grids = [Grid(1, 8, 8)] * 5 + [Grid(1, 4, 12)] * 3
    with torch.inference_mode():
        side = tower.patch_size
        tower.forward(torch.randn(sum(g.num_patches for g in grids), side, side, 3), grids)
    config = tower.module.config
    depth = config.depth if hasattr(config, "depth") else config.num_hidden_layers
    assert len(calls) == depth
    assert max(lengths) == 64  # The largest picture's patches.
    if family == "qwen2_5_vl":
        assert len(lengths) == 2 * 2 + 2  # In two layers all windows are alike: one run.
    else:
        assert len(lengths) == 2 * depth  # Two kinds of pictures.


def test_grouped_attention_equals_one_segment_at_a_time() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [4, 4, 4, 9, 1, 1, 16, 4]
    q, k, v = (torch.randn(1, 3, sum(lengths), 8, generator=generator) for _ in range(3))
    packing = varlen.Packing.of(lengths, torch.device("cpu"))
    assert packing.runs == ((3, 4), (1, 9), (2, 1), (1, 16), (1, 4))
    assert packing.cu_seqlens.tolist() == [0, 4, 8, 12, 21, 22, 23, 39, 43]
    assert packing.max_seqlen == 16
    output, _ = varlen.attend(
        None, q, k, v, None, scaling=0.3, cu_seq_lens_q=packing.cu_seqlens, packings=[packing]
    )
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    one_by_one = [((a @ b.mT * 0.3).softmax(-1) @ c).transpose(1, 2) for a, b, c in parts]
    torch.testing.assert_close(output, torch.cat(one_by_one, dim=1))


@pytest.mark.parametrize("fault", ["wrong", "absent"])
def test_a_kernel_that_is_not_used_is_told(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def kernel(q: torch.Tensor, *_: Any) -> torch.Tensor:
        if fault == "absent":
            raise RuntimeError("no kernel image is available")
        return torch.zeros_like(q)

    monkeypatch.setattr(varlen, "_attend_by_kernel", kernel)
    varlen.has_varlen_kernel.cache_clear()
    with caplog.at_level("WARNING"):
        assert not varlen.has_varlen_kernel(torch.device("cpu"), torch.bfloat16, 40)
    assert "not used for bfloat16 heads of 40" in caplog.text
    reason = "its results are wrong" if fault == "wrong" else "no kernel image is available"
    assert reason in caplog.text
    varlen.has_varlen_kernel.cache_clear()


@pytest.mark.parametrize(("h", "w"), [(2, 2), (3, 5), (4, 4), (7, 2), (1, 9)])
def test_windows_are_those_of_the_reference(h: int, w: int) -> None:
    """The same blocks share a window; equal windows stand together."""
    order, counts = window_order(h, w, 2)
    index, bounds = get_vision_window_index(torch.tensor([[1, 2 * h, 2 * w]]), 2, 56, 14)
    sizes = (bounds.diff() // 4).tolist()
    expected = {tuple(part.tolist()) for part in index.split(sizes)}
    ours = {tuple(part) for part in np.split(order, np.cumsum(counts)[:-1])}
    assert ours == expected
    assert sorted(counts, reverse=True) == list(counts)


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 2, 8)])
def test_position_ids_are_those_of_the_reference(grid: tuple[int, int, int]) -> None:
    expected = get_vision_position_ids(torch.tensor([grid]), 2)
    assert np.array_equal(position_ids(*grid, 2), expected.numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_close(family: str, random_checkpoint: MakeCheckpoint) -> None:
    path = random_checkpoint(family)
    sizing, preprocess, exact = open_side(path)
    _, _, half = open_side(path, "bfloat16")
    plan = sizing.plan(Structure("png", 200, 200))
    pixels = preprocess(picture(200, 200), plan)
    [rows], [expected] = half.encode([pixels], [plan]), exact.encode([pixels], [plan])
    assert rows["rows"].dtype is half.dtype is torch.bfloat16
    close = F.cosine_similarity(rows["rows"].float(), expected["rows"], dim=-1)
    assert close.min() > 0.99


@pytest.mark.parametrize(("layers", "strategy"), [(-1, "full"), (2, "default"), ([-2, 1], "full")])
def test_llava_takes_the_layers_and_rows_that_the_config_names(
    layers: Any, strategy: str, tmp_path: Path
) -> None:
    path = make_checkpoint(
        "llava",
        tmp_path,
        config={"vision_feature_layer": layers, "vision_feature_select_strategy": strategy},
    )
    sizing, preprocess, tower = open_side(path)
    plan = sizing.plan(Structure("png", 70, 90))
    image = picture(70, 90)
    [item] = tower.encode([preprocess(image, plan)], [plan])
    inputs = image_processor(path, "llava")(image, return_tensors="pt")
    expect_close(item["rows"], image_rows(load_reference(path), "llava", inputs))
    assert len(item["rows"]) == plan.num_tokens == (17 if strategy == "full" else 16)


def test_llava_refuses_a_layer_that_the_tower_has_not(tmp_path: Path) -> None:
    path = make_checkpoint("llava", tmp_path, config={"vision_feature_layer": -9})
    with pytest.raises(CheckpointError, match="-9"):
        open_side(path)


def test_a_video_is_encoded_beside_a_picture(random_checkpoint: MakeCheckpoint) -> None:
    sizing, preprocess, tower = open_side(random_checkpoint("qwen2_vl"))
    still = sizing.plan(Structure("png", 84, 56))
    pixels = preprocess(picture(84, 56), still)
    grid = Grid(2, still.grid.h, still.grid.w)
    video = Plan(Modality.VIDEO, "mp4", 84, 56, 1, 84, 56, grid, 12, grid.num_patches, frames=4)
    frames = np.stack([pixels, pixels], axis=1)
    moving = np.concatenate([frames, 255 - frames])
    both = tower.encode([pixels, moving], [still, video])
    assert both[1]["rows"].shape == (12, tower.hidden_size)
    [alone] = tower.encode([pixels], [still])
    expect_close(both[0]["rows"], alone["rows"])
    expect_close(both[1]["rows"][:6], alone["rows"])  # Its first two frames are the picture.
    with pytest.raises(PlanMismatch):
        tower.encode([np.concatenate([pixels, pixels])], [video])


@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_embedding_is_one_product(bias: bool) -> None:
    torch.manual_seed(1)
    convolution = torch.nn.Conv3d(3, 40, (2, 14, 14), (2, 14, 14), bias=bias)
    embedding = PatchEmbedding(convolution)
    moving = torch.randn(50, 2, 14, 14, 3)
    with torch.inference_mode():
        expected = convolution(moving.permute(0, 4, 1, 2, 3)).flatten(1)
        torch.testing.assert_close(embedding(moving), expected, rtol=0, atol=5e-6)
        still = moving[:, 0]
        repeated = torch.stack([still, still], dim=1)
        expected = convolution(repeated.permute(0, 4, 1, 2, 3)).flatten(1)
        torch.testing.assert_close(embedding(still), expected, rtol=0, atol=5e-6)


def test_convolutions_of_adjacent_patches_become_products_and_no_others() -> None:
    torch.manual_seed(2)
    kinds = [
        torch.nn.Conv2d(3, 24, 14, 14),
        torch.nn.Conv2d(3, 24, (14, 7), (14, 7), padding="valid", bias=False),
        torch.nn.Conv2d(3, 24, 14, 7),
        torch.nn.Conv2d(3, 24, 14, 14, padding=1),
        torch.nn.Conv2d(3, 24, 14, 14, dilation=2),
        torch.nn.Conv2d(3, 24, 14, 14, groups=3),
    ]
    module = torch.nn.ModuleDict({str(i): torch.nn.Sequential(x) for i, x in enumerate(kinds)})
    use_products(module)
    pixels = torch.randn(2, 75, 60, 3).permute(0, 3, 1, 2)
    for i, convolution in enumerate(kinds):
        [made] = module[str(i)]
        assert isinstance(made, TileEmbedding) == (i < 2)
        with torch.inference_mode():
            torch.testing.assert_close(made(pixels), convolution(pixels), rtol=0, atol=5e-6)
    with pytest.raises(ValueError, match="overlap"):
        PatchEmbedding(torch.nn.Conv3d(3, 8, (2, 14, 14), (1, 14, 14)))
