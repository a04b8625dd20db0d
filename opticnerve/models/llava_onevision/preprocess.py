"""LLaVA-OneVision's preprocessing: a square and tiles, or a padded square."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opticnerve.models.llava_next.preprocess import CutTiles
from opticnerve.models.picture_sizes import check_size, resize

if TYPE_CHECKING:
    from opticnerve.media.plan import Plan
    from opticnerve.models.llava_onevision.layout import LlavaOnevisionLayout


MAX_PADDED = 4096
"""Of a taller picture, pixels at edges may differ by a few steps from those of Hugging Face's
processor, which pads it whole."""


class CutTilesOrSquare(CutTiles):
    """Returns uint8 [1, side, side, 3] for a picture that is planned as one square."""

    def __init__(self, layout: LlavaOnevisionLayout) -> None:
        super().__init__(layout)
        red, green, blue = (int(mean * 255) for mean in layout.pixels.mean)
        self.background = (red, green, blue)

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        if plan.grid.t > 1:
            return super().__call__(image, plan)
        check_size(image, plan)
        return np.asarray(self._padded(image))[None]

    def _padded(self, image: Image.Image) -> Image.Image:
        """``image`` in the middle of a square, resized. A long strip would become an enormous
        square: it is resized along its longer side before it is padded."""
        side, (width, height) = self.side, image.size
        square = (height, height)
        if width >= height:  # Which changes nothing: widths are resized first.
            image, square = resize(image, side, height, self.resample), (side, width)
        elif height > MAX_PADDED:
            image, square = resize(image, width, side, self.resample), (height, side)
        canvas = Image.new("RGB", square, self.background)
        canvas.paste(image, ((square[0] - image.width) // 2, (square[1] - image.height) // 2))
        return resize(canvas, side, side, self.resample)
