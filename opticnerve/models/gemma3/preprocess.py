"""Gemma 3's preprocessing: the whole picture as one square."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opticnerve.models.picture_sizes import check_size, resize

if TYPE_CHECKING:
    from PIL import Image

    from opticnerve.media.plan import Plan
    from opticnerve.models.gemma3.layout import Gemma3Layout


class ResizeToSquare:
    """A ``Preprocessor`` that stretches a picture to the tower's size.

    Returns uint8 [1, height, width, 3].
    """

    def __init__(self, layout: Gemma3Layout) -> None:
        self.resample = layout.pixels.resample

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
        check_size(image, plan)
        image = resize(image, plan.resized_width, plan.resized_height, self.resample)
        return np.asarray(image)[None]
