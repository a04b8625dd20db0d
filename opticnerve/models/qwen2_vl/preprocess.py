"""Qwen2-VL's preprocessing: patches of any grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opticnerve.models.picture_sizes import check_size, resize, value_table

if TYPE_CHECKING:
    from PIL import Image

    from opticnerve.media.plan import Plan
    from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout


class Patchify:
    """A ``Preprocessor`` for towers that take patches of any grid, ordered by merge blocks.

    Returns float32 [h * w, channels * temporal_patch_size * patch_size²]: rows run over merge
    blocks, then over the patches of a block. A still picture is repeated as its next frames.
    """

    def __init__(self, layout: Qwen2VLLayout) -> None:
        self.resample = layout.pixels.resample
        self.patch_size = layout.patch_size
        self.merge_size = layout.merge_size
        self.temporal_patch_size = layout.temporal_patch_size
        self._table = value_table(layout.pixels)

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.float32]:
        check_size(image, plan)
        image = resize(image, plan.resized_width, plan.resized_height, self.resample)
        h, w, merge, side = plan.grid.h, plan.grid.w, self.merge_size, self.patch_size
        blocks = np.asarray(image).reshape(h // merge, merge, side, w // merge, merge, side, 3)
        patches = np.ascontiguousarray(blocks.transpose(6, 0, 3, 1, 4, 2, 5))  # [3, h/m, w/m, m…]
        frames = self.temporal_patch_size
        out = np.empty((h * w, 3, frames, side * side), dtype=np.float32)
        for channel in range(3):
            values = np.take(self._table[channel], patches[channel]).reshape(h * w, 1, side * side)
            out[:, channel] = values
        return out.reshape(h * w, -1)
