"""LLaVA-NeXT's preprocessing: the whole picture as one square, then its tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opticnerve.models.picture_sizes import check_size, resize
from opticnerve.models.tiles import cut

if TYPE_CHECKING:
    from opticnerve.media.plan import Plan
    from opticnerve.models.llava_next.layout import LlavaNextLayout


class CutTiles:
    """A ``Preprocessor``. Returns uint8 [1 + tiles, side, side, 3], tiles row by row."""

    def __init__(self, layout: LlavaNextLayout) -> None:
        self.resample = layout.pixels.resample
        self.side = layout.image_size
        self.fitted_size = layout.fitted_size

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        check_size(image, plan)
        pixels = np.empty((plan.grid.t, self.side, self.side, 3), dtype=np.uint8)
        pixels[0] = np.asarray(resize(image, self.side, self.side, self.resample))
        pixels[1:] = self._tiles(image, plan)
        return pixels

    def _tiles(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        fitted = resize(image, *self.fitted_size(plan), self.resample)
        canvas = Image.new("RGB", (plan.resized_width, plan.resized_height))
        canvas.paste(
            fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2)
        )
        return cut(canvas, self.side)
