"""Idefics3's preprocessing: tiles of a canvas, and a small copy of the canvas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opticnerve.models.picture_sizes import check_size, resize
from opticnerve.models.tiles import cut

if TYPE_CHECKING:
    from PIL import Image

    from opticnerve.media.plan import Plan
    from opticnerve.models.idefics3.layout import Idefics3Layout


class TilesOfCanvas:
    """A ``Preprocessor`` that returns uint8 [tiles, size, size, 3]. Like the reference it resizes
    two or three times, to 8 bits each time."""

    def __init__(self, layout: Idefics3Layout) -> None:
        self.resample = layout.pixels.resample
        self.tile_size = layout.tile_size
        self.first_size = layout.first_size

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        check_size(image, plan)
        size = self.tile_size
        canvas = resize(image, *self.first_size(*image.size, plan), self.resample)
        canvas = resize(canvas, plan.resized_width, plan.resized_height, self.resample)
        tiles = cut(canvas, size)
        if len(tiles) == 1:
            return tiles
        whole = np.asarray(resize(canvas, size, size, self.resample))
        return np.concatenate([tiles, whole[None]])
