"""The torch backend: sizing at start, what exceptions mean, rows equal to the tower's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from encoder_service.backends.base import Capacity, Recovery
from encoder_service.backends.torch_backend import CPU_BATCH_PATCHES, CPU_WARM_PATCHES, TorchBackend
from encoder_service.pictures.largest_picture import largest_plan, permitted_patches, shrink
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.errors import StartupError
from opticnerve.media.plan import Grid, Modality, Overrides, Plan, Structure
from opticnerve.models.family import Tower
from opticnerve.models.registry import load_tower, make_layout, make_preprocessor
from tests import published
from tests.encoders import demo_layout

MANY_PIXELS = 89_478_485


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.set_num_threads(1)
    return load_tower(Checkpoint.open(None, side="encoder"), "float32", "cpu")


def backend_of(tower: Tower) -> TorchBackend:
    checkpoint = Checkpoint.open(None)
    layout = make_layout(checkpoint)
    return TorchBackend(
        tower,
        make_preprocessor(checkpoint, layout),
        lambda plan, patches: shrink(layout, plan, patches),
    )


def test_no_picture_has_more_patches_than_the_largest() -> None:
    layout = demo_layout()
    largest = largest_plan(layout, MANY_PIXELS)
    assert largest.width * largest.height < 10**7  # What warms must not take long to resize.
    for width in (1, 28, 84, 100, 333, 5000, 9000):
        for height in (28, 84, 112, 777, 5000):
            if max(width, height) / min(width, height) > 200:
                continue
            plan = layout.plan(Structure("png", width, height), Overrides())
            assert plan.num_patches <= permitted_patches(largest)


def test_a_smaller_plan_is_smaller_and_never_larger() -> None:
    layout = demo_layout()
    largest = largest_plan(layout, MANY_PIXELS)
    assert shrink(layout, largest, 10**9).num_patches <= largest.num_patches
    assert shrink(layout, largest, 1).num_patches < largest.num_patches


def test_a_family_that_enlarges_what_is_small_has_smaller_plans(tmp_path: Path) -> None:
    published.write("smolvlm-256m-instruct", tmp_path, weights=False)
    layout = make_layout(Checkpoint.open(str(tmp_path), side="encoder"))
    largest = largest_plan(layout, MANY_PIXELS)
    assert largest.num_patches == 17 * 1024
    assert shrink(layout, largest, CPU_WARM_PATCHES).num_patches == 1024
    assert 1024 < shrink(layout, largest, 8 * 1024).num_patches <= 8 * 1024


def test_settings_that_admit_nothing_are_a_startup_error() -> None:
    class Refusing:
        def plan(self, structure: Structure, overrides: Overrides) -> Plan:
            from opticnerve.errors import InvalidMedia

            raise InvalidMedia("no")

    with pytest.raises(StartupError):
        largest_plan(Refusing(), 100)  # type: ignore[arg-type]


def test_warm_sizes_a_cpu_batch_and_runs_an_item(tower: Tower) -> None:
    backend = backend_of(tower)
    largest = largest_plan(demo_layout(), MANY_PIXELS)
    ran: list[int] = []
    backend._tower = _Spy(tower, ran)  # type: ignore[assignment]
    capacity = backend.warm(largest, 0)
    assert capacity.max_batch_patches == CPU_BATCH_PATCHES
    assert capacity.max_item_patches >= largest.num_patches
    assert len(ran) == 1 and 0 < ran[0] <= max(CPU_WARM_PATCHES, largest.num_patches)
    assert backend.warm(largest, 64).max_batch_patches == 64


class _Spy:
    def __init__(self, tower: Tower, ran: list[int]) -> None:
        self._tower, self._ran = tower, ran

    def __getattr__(self, name: str) -> object:
        return getattr(self._tower, name)

    def encode(self, pixels: list[object], plans: list[Plan]) -> object:
        self._ran.append(sum(plan.num_patches for plan in plans))
        return self._tower.encode(pixels, plans)  # type: ignore[arg-type]


def test_rows_are_the_towers_and_own_no_device_memory(tower: Tower) -> None:
    backend = backend_of(tower)
    layout = demo_layout()
    images = [Image.new("RGB", (84, 84), "red"), Image.new("RGB", (112, 84), "blue")]
    plans = [layout.plan(Structure("png", *image.size), Overrides()) for image in images]
    pixels = [backend.preprocess(image, plan) for image, plan in zip(images, plans, strict=True)]
    both = backend.encode(pixels, plans)
    for embedding, patches, plan in zip(both, pixels, plans, strict=True):
        alone = tower.encode([patches], [plan])[0]["rows"]
        assert embedding["rows"].shape == (plan.num_tokens, backend.hidden_size)
        assert embedding["rows"].device.type == "cpu" and embedding["rows"].is_contiguous()
        assert torch.allclose(embedding["rows"], alone, atol=1e-5)


class FakeCuda:
    """A device of so many bytes; encoding takes ``per_patch`` at its peak."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, per_patch: int) -> None:
        self.total, self.per_patch, self.peak, self.ran = total, per_patch, 0, []
        self.waits = 0
        for name, function in {
            "mem_get_info": lambda device: (total, total),
            "memory_allocated": lambda device: 0,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: None,
            "empty_cache": lambda: None,
            "current_stream": lambda device: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def synchronize(self) -> None:
        self.waits += 1

    def encode(self, pixels: object, plans: list[Plan]) -> list[dict[str, torch.Tensor]]:
        patches = sum(plan.num_patches for plan in plans)
        self.peak = patches * self.per_patch
        if self.peak > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.ran.append(patches)
        return [{"rows": torch.ones(2, 3).T, "deepstack.0": torch.ones(2, 3)} for _ in plans]


def large_plan(patches: int) -> Plan:
    side = Structure("png", 14, 14 * patches)
    grid = Grid(1, patches, 1)
    return Plan(Modality.IMAGE, "png", 14, side.height, 1, 14, side.height, grid, patches, patches)


def on_cuda(tower: Tower, cuda: FakeCuda) -> TorchBackend:
    def preprocess(image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        return np.empty(0, np.uint8)

    backend = TorchBackend(tower, preprocess, lambda plan, patches: large_plan(max(patches, 16)))
    backend._on_cuda = True
    spy = _Spy(tower, [])
    spy.encode = cuda.encode  # type: ignore[method-assign]
    backend._tower = spy  # type: ignore[assignment]
    return backend


def test_a_cuda_batch_is_sized_from_free_memory(
    tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch, total=10_000_000, per_patch=1000)
    capacity = on_cuda(tower, cuda).warm(large_plan(4000), 0)
    assert capacity.max_batch_patches == 8000  # 80% of what is free.
    assert capacity.max_item_patches == permitted_patches(large_plan(4000))
    assert cuda.ran[-1] == 4000
    assert on_cuda(tower, cuda).warm(large_plan(4000), 123).max_batch_patches == 123


def test_a_batch_is_waited_for_once(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, total=10_000_000, per_patch=1000)
    plan = large_plan(16)
    encoded = on_cuda(tower, cuda).encode([np.empty(0, np.uint8)] * 3, [plan] * 3)
    assert cuda.waits == 1
    assert all(tensor.is_contiguous() for item in encoded for tensor in item.values())


def test_an_item_too_large_for_the_device_is_halved_until_it_fits(
    tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch, total=1_500_000, per_patch=1000)
    capacity = on_cuda(tower, cuda).warm(large_plan(4000), 0)
    assert capacity == Capacity(max_batch_patches=1200, max_item_patches=1024)
    with pytest.raises(StartupError, match="too little free memory"):
        on_cuda(tower, FakeCuda(monkeypatch, 10_000, 1000)).warm(large_plan(4000), 0)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Recovery.SPLIT),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), Recovery.SPLIT),
        (MemoryError(), Recovery.SPLIT),
        (RuntimeError("shape mismatch"), Recovery.ISOLATE),
        (ValueError("out of memory of mine"), Recovery.ISOLATE),
        (RuntimeError("CUDA error: device-side assert"), Recovery.ISOLATE),  # Of a CPU: no device.
    ],
)
def test_what_exceptions_mean(tower: Tower, error: Exception, failure: Recovery) -> None:
    assert backend_of(tower).classify(error) is failure


def test_a_real_allocation_that_is_too_large_is_memory(tower: Tower) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float32)
    assert backend_of(tower).classify(caught.value) is Recovery.SPLIT


def test_a_lost_cuda_device_is_told_from_a_bad_item(tower: Tower) -> None:
    backend = backend_of(tower)
    backend._on_cuda = True
    assert backend.classify(RuntimeError("CUDA error: device-side assert")) is Recovery.STOP
    assert backend.classify(RuntimeError("shape mismatch")) is Recovery.ISOLATE
