"""Ways from a JPEG's bytes to a tower's floats: ours, ours as it was, and Hugging Face's two."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.media.decode import decode
from opticnerve.media.plan import Plan
from opticnerve.media.probe import parse_structure
from opticnerve.models import registry
from opticnerve.models.picture_sizes import resize
from opticnerve.models.towers.pixels import PixelTable, upload, value_table
from tests.families import Sample, samples

TORCHVISION = "torchvision==0.28.0"  # The release for the torch of constraints.txt.
CPU = torch.device("cpu")

Clock = Callable[[], float]
Stages = dict[str, float]
Way = Callable[[bytes], tuple[Stages, Any]]
"""Prepares one picture. Returns (seconds by stage, the tower's input)."""


class Ours:
    """Decodes, resizes and cuts on the CPU; the table is the tower's first step."""

    def __init__(self, path: Path, jpeg: bytes, clock: Clock) -> None:
        self.clock = clock
        checkpoint = Checkpoint.open(str(path), side="encoder")
        self.layout: Any = registry.make_layout(checkpoint)
        self.preprocess = registry.make_preprocessor(checkpoint, self.layout)
        self.plan = self.layout.plan(parse_structure(jpeg))
        self.table = PixelTable(self.layout.pixels, torch.float32, CPU)

    def __call__(self, jpeg: bytes) -> tuple[Stages, NDArray[np.uint8]]:
        clock = self.clock
        started = clock()
        image = decode(jpeg, self.plan)
        decoded = clock()
        with resizing(clock) as spent:
            pixels = self.preprocess(image, self.plan)
        cut = clock()
        self.table(upload([pixels], CPU))
        stages = {
            "decode": decoded - started,
            "resize": sum(spent),
            "cut": cut - decoded - sum(spent),
            "table": clock() - cut,
        }
        return stages, pixels

    def as_it_was(self, jpeg: bytes) -> tuple[Stages, NDArray[np.float32]]:
        """The former way: floats, with each patch's doubled frame, were made on the CPU."""
        clock = self.clock
        started = clock()
        image = decode(jpeg, self.plan)
        decoded = clock()
        table = value_table(self.layout.pixels)
        with resizing(clock) as spent:
            if hasattr(self.layout, "temporal_patch_size"):
                values = _float_patches(image, self.plan, self.layout, table)
            else:
                planes = self.preprocess(image, self.plan)[0].transpose(2, 0, 1)
                values = np.stack([np.take(table[c], planes[c]) for c in range(3)])[None]
        spent_on_cut = clock() - decoded - sum(spent)
        return {"decode": decoded - started, "resize": sum(spent), "cut": spent_on_cut}, values


def _float_patches(
    image: Image.Image, plan: Plan, layout: Any, table: NDArray[np.float32]
) -> NDArray[np.float32]:
    image = resize(image, plan.resized_width, plan.resized_height, layout.pixels.resample)
    h, w, merge, side = plan.grid.h, plan.grid.w, layout.merge_size, layout.patch_size
    blocks = np.asarray(image).reshape(h // merge, merge, side, w // merge, merge, side, 3)
    patches = np.ascontiguousarray(blocks.transpose(6, 0, 3, 1, 4, 2, 5))
    out = np.empty((h * w, 3, layout.temporal_patch_size, side * side), dtype=np.float32)
    for c in range(3):
        out[:, c] = np.take(table[c], patches[c]).reshape(h * w, 1, side * side)
    return out.reshape(h * w, -1)


def theirs(sample: Sample, processor: Any, clock: Clock) -> Way:
    """Hugging Face's image processor, after Pillow has decoded."""

    def prepare(jpeg: bytes) -> tuple[Stages, Any]:
        started = clock()
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        decoded = clock()
        with resizing(clock) as spent:
            values = sample.image_inputs(processor, [image])["pixel_values"]
        stages = {"decode": decoded - started, "cut": clock() - decoded - sum(spent)}
        return stages | ({"resize": sum(spent)} if spent else {}), values

    return prepare


@contextlib.contextmanager
def resizing(clock: Clock) -> Iterator[list[float]]:
    """The seconds of each call of Pillow's resize while the context lasts."""
    spent: list[float] = []
    unwatched = Image.Image.resize

    def watched(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        started = clock()
        resized = unwatched(self, *args, **kwargs)
        spent.append(clock() - started)
        return resized

    with mock.patch.object(Image.Image, "resize", watched):
        yield spent


def add_torchvision(folder: Path) -> str:
    """Installs torchvision alone into ``folder``, for this process only. Returns the reason if that
    fails, else "". Call it before transformers is imported, which looks for torchvision.

    Its compiled operators, made for another build of torch, need not load, since no image processor
    calls them. Modules that refer to them at import get declarations.
    """
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, TORCHVISION], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    sys.path.append(str(folder))
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return ""


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # Its operators end with it.


def torchvision_processor(family: str, pillow_backed: Any) -> Any:
    """The torchvision-backed image processor of the same settings."""
    from importlib import import_module

    module, _, name = samples()[family].image_processor_class.partition(":")
    module = f"transformers.models.{module.replace('_pil_', '_')}"
    kind = getattr(import_module(module), name.removesuffix("Pil"))
    return kind.from_dict(pillow_backed.to_dict())
