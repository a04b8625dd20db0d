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
        """``image`` in the middle of a square, resized: first along its longer side, so that a
        long strip never becomes an enormous square. Of a tall picture, a pixel may differ by one
        step from that of the reference, which resizes widths first."""
        side, longest = self.side, max(image.size)
        if image.width >= image.height:
            narrow = resize(image, side, image.height, self.resample)
            square = Image.new("RGB", (side, longest), self.background)
            square.paste(narrow, (0, (longest - image.height) // 2))
        else:
            narrow = resize(image, image.width, side, self.resample)
            square = Image.new("RGB", (longest, side), self.background)
            square.paste(narrow, ((longest - image.width) // 2, 0))
        return resize(square, side, side, self.resample)
