"""The accuracy gate: compares an engine's rows of fixed probe pictures with the torch tower's.

The build records the torch tower's rows, in float32, beside the engine. Whenever an engine is
loaded, its rows of the same pictures, on the device that will serve, are compared with those.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from encoder_service.backends.base import Bucket, Embedding
from encoder_service.engines.buckets import planned
from encoder_service.engines.sidecar import Parity
from opticnerve.embeddings import codec
from opticnerve.errors import OpticNerveError, UnusableEngine
from opticnerve.media.plan import Plan
from opticnerve.tensors.distance import LIMITS, compare

if TYPE_CHECKING:
    from opticnerve.models.family import Layout, Preprocessor, Tower
    from opticnerve.models.towers.graph import TowerGraph

Encode = Callable[[Sequence[NDArray[np.uint8]], Sequence[Plan]], Sequence[Embedding]]
Rows = Mapping[str, torch.Tensor]
"""Tensors of probes, float32, by "<probe's index>.<tensor's name>"."""

ASPECT_STEPS = 8  # From square to the longest, in both directions.
STEP = 0.93  # Ratio of each area that is tried to the one before.
NEAR = 1.15  # Numbers of patches within this factor count as equal; the squarest picture is taken.


@dataclass(frozen=True, slots=True)
class Probe:
    bucket: int  # Index of the bucket that it belongs to.
    pixels: NDArray[np.uint8]
    plan: Plan


def make_probes(
    layout: Layout,
    preprocess: Preprocessor,
    graph: TowerGraph,
    buckets: Sequence[Bucket],
    largest: Plan,
) -> list[Probe]:
    """Two probes for each bucket: a picture that nearly fills it, and one that barely does not fit
    the bucket below. A bucket that no picture of this checkpoint would use gets none."""
    probes: list[Probe] = []
    for i, bucket in enumerate(buckets):
        below = buckets[i - 1].patches if i else 0
        plans = [
            plan
            for plan in _candidates(layout, largest, below, bucket.patches)
            if below < graph.patches(plan) <= bucket.patches
            and graph.pictures(plan) <= bucket.pictures
        ]
        for plan in _fullest_and_emptiest(plans):
            pixels = preprocess(probe_image(plan, len(probes)), plan)
            probes.append(Probe(i, pixels, plan))
    return probes


def _candidates(layout: Layout, largest: Plan, below: int, patches: int) -> Iterator[Plan]:
    """Plans of pictures of many shapes, from about ``patches`` down to about ``below``."""
    area = largest.resized_width * largest.resized_height / largest.num_patches
    areas = [NEAR * patches * area]
    while areas[-1] * STEP > max(below / NEAR, 1) * area:
        areas.append(areas[-1] * STEP)
    return planned(layout, ASPECT_STEPS, areas)


def _fullest_and_emptiest(plans: Sequence[Plan]) -> list[Plan]:
    """The plans with about the most and about the fewest patches, in each case the squarest; empty
    without plans."""
    if not plans:
        return []
    most = max(plan.num_patches for plan in plans)
    least = min(plan.num_patches for plan in plans)
    full = min((p for p in plans if p.num_patches * NEAR >= most), key=_elongation)
    empty = min((p for p in plans if p.num_patches <= least * NEAR), key=_elongation)
    return [full, empty]


def _elongation(plan: Plan) -> float:
    return abs(math.log(plan.resized_width / plan.resized_height))


def probe_image(plan: Plan, seed: int) -> Image.Image:
    """A picture of waves, a disc and edges in colour, of the plan's displayed size. It is computed
    from integers, without randomness, so it is the same on every machine."""
    y, x = np.indices((plan.height, plan.width), dtype=np.int64)
    u, v = x * 1024 // plan.width, y * 1024 // plan.height
    disc = (u - 300 - 100 * (seed % 4)) ** 2 + (v - 600) ** 2 < 230**2
    channels = [
        abs((u * (5 + i + seed) + v * (4 + 2 * i)) % 1024 - 512) // 3 + 70 * disc for i in range(3)
    ]
    channels[1] += 60 * ((x // 23 + y // 17) % 2)
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def digests(probes: Sequence[Probe]) -> tuple[str, ...]:
    """SHA-256 of each probe's pixels."""
    return tuple(
        hashlib.sha256(np.ascontiguousarray(probe.pixels).tobytes()).hexdigest() for probe in probes
    )


def require_probes(probes: Sequence[Probe], buckets: Sequence[Bucket]) -> None:
    """Raises UnusableEngine for a bucket without probes, whose rows nothing would measure."""
    unmeasured = [
        bucket.patches
        for i, bucket in enumerate(buckets)
        if not any(probe.bucket == i for probe in probes)
    ]
    if unmeasured:
        raise UnusableEngine(
            f"no picture of this checkpoint uses the engine's buckets {unmeasured}, so their rows "
            "cannot be measured; build it again"
        )


def torch_rows(tower: Tower, probes: Sequence[Probe]) -> Iterator[tuple[str, torch.Tensor]]:
    """The torch tower's rows of each probe, one probe after the other; see ``Rows``."""
    for i, probe in enumerate(probes):
        (item,) = tower.encode([probe.pixels], [probe.plan])
        for name, tensor in item.items():
            yield f"{i}.{name}", tensor.float().cpu()


def write_rows(path: Path, rows: Rows) -> None:
    path.write_bytes(codec.to_bytes(rows, {}))


def read_rows(path: Path) -> Rows:
    """Raises UnusableEngine for a file that ``write_rows`` did not write."""
    try:
        rows, _ = codec.from_bytes(path.read_bytes())
    except (OSError, OpticNerveError) as error:
        raise UnusableEngine(
            f"{path} holds no rows to compare with; build the engine again"
        ) from error
    return rows


def measure(
    encode: Encode, probes: Sequence[Probe], buckets: Sequence[Bucket], rows: Rows
) -> tuple[Parity, ...]:
    """How near ``encode``'s rows of the probes are to ``rows``, for each bucket. The probes of a
    bucket are encoded together. Raises UnusableEngine for rows of another shape."""
    found = []
    for i, bucket in enumerate(buckets):
        mine = [(j, probe) for j, probe in enumerate(probes) if probe.bucket == i]
        made = encode([probe.pixels for _, probe in mine], [probe.plan for _, probe in mine])
        pairs = [
            _pair(tensor, rows.get(f"{j}.{name}"))
            for (j, _), item in zip(mine, made, strict=True)
            for name, tensor in item.items()
        ]
        found.append(Parity(bucket.patches, compare(pairs)))
    return tuple(found)


def _pair(got: torch.Tensor, want: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if want is None or got.shape != want.shape:
        raise UnusableEngine(
            f"the engine's rows of a probe picture have shape {tuple(got.shape)}, the torch "
            f"tower's {None if want is None else tuple(want.shape)}; build it again"
        )
    return got.float(), want


def require(parity: Sequence[Parity], precision: str) -> None:
    """Raises UnusableEngine, with the figures, unless every bucket passes."""
    failed = [each for each in parity if not each.distance.within(LIMITS[precision])]
    if failed:
        figures = "; ".join(each.describe(precision) for each in failed)
        raise UnusableEngine(
            f"the engine's rows are too far from the torch tower's in {precision}: {figures}. "
            "Build it in a higher precision, or serve with --backend torch"
        )
