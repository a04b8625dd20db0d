"""The graph of Qwen2.5-VL's tower, with a frame's patches ordered window by window.

A row of the batch consists of bins, each of a whole window's size. A whole window fills a bin;
windows that an edge cuts share bins, where a mask keeps them apart. Windowed layers take the bins
as rows of one length, so nothing is reordered between layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from opticnerve.models.qwen2_5_vl.vision import WindowTower, window_order
from opticnerve.models.towers.graph import CLOSED, PATCHES, PICTURES, GraphInput
from opticnerve.models.towers.patch_graph import PatchGraph

if TYPE_CHECKING:
    from opticnerve.media.plan import Grid

NO_WINDOW = -1  # The window of padding, which attends to itself.


class WindowGraph(PatchGraph):
    """Adds to PatchGraph the input "window_mask", [pictures, patches, patches of a bin]: for each
    patch, 0 where the bin's patch is of the same window, else ``CLOSED``."""

    def __init__(self, tower: WindowTower) -> None:
        config = tower.module.config
        self._window = tower.window
        bin_size = (tower.window * tower.merge_size) ** 2
        windowed = [i for i in range(config.depth) if i not in config.fullatt_block_indexes]
        super().__init__(tower, windowed=windowed, bin_size=bin_size)
        self.unit = bin_size
        mask = GraphInput((PICTURES, PATCHES, bin_size), self.dtype)
        self.inputs = {**self.inputs, "window_mask": mask}

    def row_length(self, h: int, w: int) -> int:
        return int(self.row_places(h, w).max()) + 1

    def row_places(self, h: int, w: int) -> NDArray[np.int64]:
        block = self._merge_size**2
        places, _ = self._packed(h, w)
        return (places[:, None] * block + np.arange(block)).ravel()

    def masks(
        self, grids: Sequence[Grid], places: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        windows = [
            np.tile(np.repeat(self._packed(grid.h, grid.w)[1], self._merge_size**2), grid.t)
            for grid in grids
        ]
        shape = shapes["window_mask"]
        bins = torch.full(shape[:2], NO_WINDOW, device=self.device).view(-1, shape[2])
        bins.view(-1).index_copy_(0, places, self._upload(np.concatenate(windows)))
        mask = torch.zeros(shape, dtype=self.dtype, device=self.device)
        mask.view(*bins.shape, shape[2]).masked_fill_(bins[:, :, None] != bins[:, None], CLOSED)
        return super().masks(grids, places, shapes) | {"window_mask": mask}

    def _packed(self, h: int, w: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return pack_windows(h // self._merge_size, w // self._merge_size, self._window)


@lru_cache(maxsize=256)
def pack_windows(h: int, w: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """int64 [h * w] each: the place and the window's number of every merge block of a frame.

    Bins hold ``window`` ** 2 blocks. The largest windows are placed first, each in the first bin
    that has room for it.
    """
    order, lengths = window_order(h, w, window)
    places, windows = np.empty((2, h * w), dtype=np.int64)
    size, bins, start = window**2, 0, 0
    open_bins: dict[int, int] = {}  # Blocks used in each bin that is not full.
    for number, length in enumerate(lengths):
        chosen = next((b for b, used in open_bins.items() if used + length <= size), bins)
        bins = max(bins, chosen + 1)
        used = open_bins.pop(chosen, 0)
        blocks = order[start : start + length]
        places[blocks] = np.arange(length) + chosen * size + used
        windows[blocks] = number
        if used + length < size:
            open_bins[chosen] = used + length
        start += length
    return places, windows
