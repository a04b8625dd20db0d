"""A tower's graph, run by torch: equal to the tower, whatever is in one call and in the padding."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import PlanMismatch, UnsupportedCheckpoint
from opticnerve.media.plan import Grid
from opticnerve.models import registry
from opticnerve.models.qwen2_5_vl.graph import pack_windows
from opticnerve.models.qwen2_5_vl.vision import window_order
from opticnerve.models.towers.graph import CLOSED
from tests.graphs import BATCHES, DECLARED, EXPORTABLE, Half, largest_difference, lowest_cosine


@pytest.fixture(scope="module", params=EXPORTABLE)
def half(request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path]) -> Half:
    return Half.load(random_checkpoint(request.param))


@pytest.mark.parametrize("sizes", BATCHES, ids=len)
def test_it_equals_the_tower(half: Half, sizes: tuple[tuple[int, int], ...]) -> None:
    pixels, plans = half.batch(sizes)
    outputs = half.run(half.graph.prepare(pixels, plans, half.bucket(plans)))
    items, expected = half.graph.split(outputs, plans), half.tower.encode(pixels, plans)
    assert lowest_cosine(items, expected) >= 0.99999
    assert largest_difference(items, expected) <= 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
@pytest.mark.parametrize("family", EXPORTABLE)
def test_it_equals_the_tower_on_a_gpu(family: str, random_checkpoint: Callable[..., Path]) -> None:
    half = Half.load(random_checkpoint(family), "float16", "cuda")
    pixels, plans = half.batch(BATCHES[1])
    inputs = half.graph.prepare(pixels, plans, half.bucket(plans))
    assert {each.device.type for each in inputs.values()} == {"cuda"}
    items, expected = half.graph.split(half.run(inputs), plans), half.tower.encode(pixels, plans)
    assert lowest_cosine(items, expected) >= 0.999


def test_shapes_and_types_are_those_declared(half: Half) -> None:
    pixels, plans = half.batch(BATCHES[1])
    patches, pictures = half.bucket(plans), sum(map(half.graph.pictures, plans))
    inputs = half.graph.prepare(pixels, plans, patches)
    assert tuple(inputs) == half.graph.input_names
    shapes = half.graph.shapes(pictures, patches)
    assert {name: tuple(each.shape) for name, each in inputs.items()} == shapes
    example = half.graph.example(pictures, patches)
    for name, each in inputs.items():
        assert each.is_contiguous()
        assert (example[name].shape, example[name].dtype) == (each.shape, each.dtype)
    outputs = half.run(inputs)
    shapes = half.graph.output_shapes(pictures, patches)
    assert {name: tuple(each.shape) for name, each in outputs.items()} == shapes
    assert {each.dtype for each in outputs.values()} == {half.graph.dtype}


def test_neither_the_rest_of_a_call_nor_the_bucket_changes_rows(half: Half) -> None:
    pixels, plans = half.batch(BATCHES[1])
    together = half.graph.prepare(pixels, plans, half.bucket(plans))
    items = half.graph.split(half.run(together), plans)
    for i, plan in enumerate(plans):
        alone = half.graph.prepare(pixels[i : i + 1], [plan], half.bucket([plan], spare=i))
        [item] = half.graph.split(half.run(alone), [plan])
        assert largest_difference([item], [items[i]]) <= 1e-5


def test_padding_does_not_leak(half: Half) -> None:
    if half.graph.fixed_patches:
        pytest.skip("pictures of one size are not padded")
    pixels, plans = half.batch(BATCHES[2])
    inputs = half.graph.prepare(pixels, plans, half.bucket(plans))
    is_padding = inputs["key_mask"].flatten(1) == CLOSED
    assert is_padding.any(dim=1).all() and not is_padding.all(dim=1).any()
    items = half.graph.split(half.run(inputs), plans)
    with torch.inference_mode():
        for name in set(inputs) - {"key_mask", "window_mask"}:
            inputs[name][is_padding] = torch.randn_like(inputs[name][is_padding]) * 100
    others = half.graph.split(half.run(inputs), plans)
    for item, other in zip(items, others, strict=True):
        assert item.keys() == other.keys()
        assert all(torch.equal(rows, other[name]) for name, rows in item.items())


def test_rows_outlive_the_outputs(half: Half) -> None:
    pixels, plans = half.batch(BATCHES[0])
    outputs = half.run(half.graph.prepare(pixels, plans, half.bucket(plans)))
    [item] = half.graph.split(outputs, plans)
    before = {name: rows.clone() for name, rows in item.items()}
    with torch.inference_mode():
        for output in outputs.values():
            output.zero_()
    assert all(torch.equal(rows, before[name]) for name, rows in item.items())


def test_pixels_that_differ_from_the_plan_are_refused(half: Half) -> None:
    pixels, plans = half.batch(BATCHES[1])
    with pytest.raises(PlanMismatch, match="pixels"):
        half.graph.prepare([pixels[0][:, :-1]], plans[:1], half.bucket(plans))


def test_a_bucket_that_is_too_small_is_refused(half: Half) -> None:
    if half.graph.fixed_patches:
        pytest.skip("there is one bucket")
    pixels, plans = half.batch(BATCHES[0])
    with pytest.raises(PlanMismatch, match="bucket"):
        half.graph.prepare(pixels, plans, half.graph.unit)


def test_weights_are_shared(random_checkpoint: Callable[..., Path]) -> None:
    half = Half.load(random_checkpoint("qwen2_5_vl"))
    assert half.graph.module is not None
    own = {weight.data_ptr() for weight in half.tower.module.parameters()}
    assert {weight.data_ptr() for weight in half.graph.module.parameters()} <= own


@pytest.mark.parametrize("family", EXPORTABLE)
def test_a_released_graph_keeps_no_layer(
    family: str, random_checkpoint: Callable[..., Path]
) -> None:
    half = Half.load(random_checkpoint(family))
    pixels, plans = half.batch(BATCHES[0])
    inputs = half.graph.prepare(pixels, plans, half.bucket(plans))
    outputs, expected = half.run(inputs), half.tower.encode(pixels, plans)
    layers = [weakref.ref(half.tower.module), weakref.ref(half.graph.module)]
    half.graph.release()
    half = replace(half, tower=None)
    gc.collect()
    assert [layer() for layer in layers] == [None, None]
    again = half.graph.prepare(pixels, plans, half.bucket(plans))
    assert all(torch.equal(each, again[name]) for name, each in inputs.items())
    assert largest_difference(half.graph.split(outputs, plans), expected) < 1e-4


def test_frames_are_pictures_of_the_graph(random_checkpoint: Callable[..., Path]) -> None:
    half = Half.load(random_checkpoint("qwen2_5_vl"))
    pixels, plans = half.batch(((100, 80), (57, 201)))
    grid = plans[0].grid
    plans[0] = replace(
        plans[0],
        grid=Grid(3, grid.h, grid.w),
        num_patches=3 * plans[0].num_patches,
        num_tokens=3 * plans[0].num_tokens,
    )
    frames = [pixels[0], pixels[0][::-1], np.roll(pixels[0], 7, axis=0)]
    pixels[0] = np.concatenate(frames)
    assert sum(map(half.graph.pictures, plans)) == 4
    outputs = half.run(half.graph.prepare(pixels, plans, half.bucket(plans)))
    expected = half.tower.encode(pixels, plans)
    assert lowest_cosine(half.graph.split(outputs, plans), expected) >= 0.99999


def test_a_family_without_a_graph_is_refused(
    random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(str(random_checkpoint("qwen2_vl")), side="encoder")
    bare = replace(DECLARED["qwen2_vl"], graph="")
    monkeypatch.setattr(registry, "find_family", lambda config: bare)
    with pytest.raises(UnsupportedCheckpoint, match="Qwen2-VL has no tower that can be exported"):
        registry.make_graph(checkpoint, tower=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("h", "w"), [(1, 1), (4, 4), (5, 5), (1, 50), (37, 27), (27, 6), (9, 300)])
def test_windows_are_packed_whole_into_bins(h: int, w: int) -> None:
    places, windows = pack_windows(h, w, 4)
    assert len(set(places)) == h * w and places.min() >= 0
    bins = -(-(places.max() + 1) // 16)
    assert bins <= np.ceil(h / 4) * np.ceil(w / 4)
    order, lengths = window_order(h, w, 4)
    bounds = np.cumsum([0, *lengths])
    for number, (start, end) in enumerate(pairwise(bounds)):
        blocks = order[start:end]
        assert set(windows[blocks]) == {number}
        assert len(set(places[blocks] // 16)) == 1, "a window lies in one bin"


def test_bins_are_nearly_full() -> None:
    places, _ = pack_windows(37, 27, 4)  # A picture of 1024 x 768: 70 windows.
    assert places.max() // 16 + 1 == 63  # 999 blocks need 62.4.
