"""LLaVA-1.5's preprocessing: one square."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opticnerve.models.picture_sizes import check_size, resize

if TYPE_CHECKING:
    from PIL import Image

    from opticnerve.media.plan import Plan
    from opticnerve.models.llava.layout import LlavaLayout


class CenterCrop:
    """A ``Preprocessor`` that resizes the shortest edge and cuts out the centre.

    Returns uint8 [1, height, width, 3].
    """

    def __init__(self, layout: LlavaLayout) -> None:
        self.resample = layout.pixels.resample
        self.resized_size = layout.resized_size

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        check_size(image, plan)
        image = resize(image, *self.resized_size(*image.size), self.resample)
        image = _center_crop(image, plan.resized_width, plan.resized_height)
        return np.asarray(image)[None]


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of ``image``, black where it is too small."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
