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
"""Height above which a picture is resized before it is padded. Its pixels at edges may then differ
by a few steps from those of Hugging Face's processor, which pads first."""


class CutTilesOrSquare(CutTiles):
    """As CutTiles, but a picture that is planned as one square is uint8 [1, side, side, 3]."""

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
        """``image`` in the middle of a square, resized. A long strip is resized along its longer
        side before it is padded, or it would become an enormous square."""
        side, (width, height) = self.side, image.size
        square = (height, height)
        if width >= height:  # Changes no pixel: a resize does widths first anyway.
            image, square = resize(image, side, height, self.resample), (side, width)
        elif height > MAX_PADDED:
            image, square = resize(image, width, side, self.resample), (height, side)
        canvas = Image.new("RGB", square, self.background)
        canvas.paste(image, ((square[0] - image.width) // 2, (square[1] - image.height) // 2))
        return resize(canvas, side, side, self.resample)
