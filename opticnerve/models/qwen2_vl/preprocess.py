"""Qwen2-VL's preprocessing: patches of any grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opticnerve.models.picture_sizes import check_size, resize

if TYPE_CHECKING:
    from PIL import Image

    from opticnerve.media.plan import Plan
    from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout


class Patchify:
    """A ``Preprocessor`` for towers that take patches of any grid, ordered by merge blocks.

    Returns uint8 [h * w, patch_size, patch_size, 3]: merge block by merge block, then the patches
    within each block.
    """

    def __init__(self, layout: Qwen2VLLayout) -> None:
        self.resample = layout.pixels.resample
        self.patch_size = layout.patch_size
        self.merge_size = layout.merge_size

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        check_size(image, plan)
        image = resize(image, plan.resized_width, plan.resized_height, self.resample)
        h, w, merge, side = plan.grid.h, plan.grid.w, self.merge_size, self.patch_size
        blocks = np.asarray(image).reshape(h // merge, merge, side, w // merge, merge, side, 3)
        patches = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 2, 5, 6))
        return patches.reshape(h * w, side, side, 3)
