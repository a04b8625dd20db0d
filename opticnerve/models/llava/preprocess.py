"""LLaVA-1.5's preprocessing: one square."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opticnerve.models.picture_sizes import check_size, resize, value_table

if TYPE_CHECKING:
    from PIL import Image

    from opticnerve.media.plan import Plan
    from opticnerve.models.llava.layout import LlavaLayout


class CenterCrop:
    """A ``Preprocessor`` that resizes the shortest edge and cuts out the centre.

    Returns float32 [1, 3, height, width].
    """

    def __init__(self, layout: LlavaLayout) -> None:
        self.resample = layout.pixels.resample
        self.resized_size = layout.resized_size
        self._table = value_table(layout.pixels)

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.float32]:
        check_size(image, plan)
        image = resize(image, *self.resized_size(*image.size), self.resample)
        image = _center_crop(image, plan.resized_width, plan.resized_height)
        planes = np.asarray(image).transpose(2, 0, 1)
        return np.stack([np.take(self._table[c], planes[c]) for c in range(3)])[None]


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of ``image``, black where it is too small."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
