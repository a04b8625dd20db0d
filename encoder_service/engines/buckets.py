"""The sizes that an engine is built for, and whether they hold every picture.

A picture's patches are counted with padding here, as by ``TowerGraph.patches``: a tower with window
attention pads the windows at the picture's edges, so a picture may need a larger bucket than its
``num_patches``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from encoder_service.backends.base import Bucket
from encoder_service.backends.torch_backend import CPU_BATCH_PATCHES
from encoder_service.pictures.largest_picture import ASPECT_LIMIT, ROUNDING_MARGIN
from opticnerve.errors import ConfigError, InvalidMedia, UnusableEngine
from opticnerve.media.plan import Overrides, Plan, Structure

if TYPE_CHECKING:
    from opticnerve.models.family import Layout
    from opticnerve.models.towers.graph import TowerGraph

GPU_BUCKETS, CPU_BUCKETS = (1024, 4096, 16_384), (256, 1024, 4096)
GPU_CALL, CPU_CALL = 16_384, 4096  # Patches of one call; larger calls gain no throughput.
MAX_BUCKETS = 16
ASPECT_STEPS = 32  # From square to the limit, in both directions, in the search of the largest.
AREAS = (1.0, 0.95)  # Parts of the largest picture's area: a smaller one may need more padding.


def choose_buckets(
    backend: str, wanted: Sequence[int], layout: Layout, graph: TowerGraph, largest: Plan
) -> tuple[Bucket, ...]:
    """Buckets for ``wanted`` sizes (none: the default), rounded up to the graph's unit, and none
    larger than the largest picture needs. Raises ConfigError for too many."""
    default, call = (CPU_BUCKETS, CPU_CALL) if backend == "onnx" else (GPU_BUCKETS, GPU_CALL)
    most = graph.pictures(largest)
    if graph.fixed_patches is not None:
        sizes = {graph.fixed_patches}
    else:
        limit = largest_bucket(layout, graph, largest)
        sizes = {min(_round_up(size, graph.unit), limit) for size in wanted or default}
    if len(sizes) > MAX_BUCKETS:
        raise ConfigError(f"an engine has up to {MAX_BUCKETS} buckets; name fewer", param="buckets")
    return tuple(Bucket(size, max(most, call // size, 1)) for size in sorted(sizes))


def largest_bucket(layout: Layout, graph: TowerGraph, largest: Plan) -> int:
    """The smallest bucket that holds every picture of the checkpoint's own settings, with a margin
    for shapes that were not tried. ``largest``: the picture of the most patches."""
    if graph.fixed_patches is not None:
        return graph.fixed_patches
    area = largest.resized_width * largest.resized_height
    plans = planned(layout, ASPECT_STEPS, [area * share for share in AREAS])
    most = max(map(graph.patches, (largest, *plans)))
    return _round_up(math.ceil(most * ROUNDING_MARGIN), graph.unit)


def hold_all(buckets: Sequence[Bucket], layout: Layout, graph: TowerGraph, largest: Plan) -> bool:
    """Whether the buckets hold every picture that an encoder with torch would take.

    On a CPU, torch takes pictures of up to a whole batch if a request may ask for more pixels than
    the checkpoint's settings permit.
    """
    needed = largest_bucket(layout, graph, largest)
    can_ask_for_more = graph.fixed_patches is None and "max_pixels" in layout.settings()
    if graph.device.type == "cpu" and can_ask_for_more:
        needed = max(needed, CPU_BATCH_PATCHES)
    return buckets[-1].patches >= needed


def check_fit(buckets: Sequence[Bucket], graph: TowerGraph) -> None:
    """Raises UnusableEngine for buckets that the graph does not have."""
    sizes = [bucket.patches for bucket in buckets]
    if graph.fixed_patches is not None:
        fits, wanted = sizes == [graph.fixed_patches], f"one of {graph.fixed_patches}"
    else:
        fits, wanted = not any(size % graph.unit for size in sizes), f"multiples of {graph.unit}"
    if not fits:
        raise UnusableEngine(
            f"the engine has buckets of {sizes} patches, its tower needs {wanted}; build it again"
        )


def planned(layout: Layout, steps: int, areas: Sequence[float]) -> Iterator[Plan]:
    """Plans of pictures of each area, in pixels, and of ``2 * steps + 1`` aspects, tall to wide."""
    for step in range(-steps, steps + 1):
        aspect = ASPECT_LIMIT ** (step / steps)
        for area in areas:
            width = max(1, round(math.sqrt(area * aspect)))
            height = max(1, round(math.sqrt(area / aspect)))
            with contextlib.suppress(InvalidMedia):
                yield layout.plan(Structure("png", width, height), Overrides())


def _round_up(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit
