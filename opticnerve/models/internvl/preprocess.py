"""InternVL's preprocessing: tiles, and a thumbnail of the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opticnerve.models.picture_sizes import check_size, resize
from opticnerve.models.tiles import cut

if TYPE_CHECKING:
    from PIL import Image

    from opticnerve.media.plan import Plan
    from opticnerve.models.internvl.layout import InternVLLayout


class TilesAndThumbnail:
    """A ``Preprocessor`` that returns uint8 [tiles, size, size, 3]; the thumbnail, where there are
    several tiles, is resized from the picture itself."""

    def __init__(self, layout: InternVLLayout) -> None:
        self.resample = layout.pixels.resample
        self.tile_size = layout.tile_size

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        check_size(image, plan)
        size = self.tile_size
        tiles = cut(resize(image, plan.resized_width, plan.resized_height, self.resample), size)
        if len(tiles) == 1:
            return tiles
        thumbnail = np.asarray(resize(image, size, size, self.resample))
        return np.concatenate([tiles, thumbnail[None]])
