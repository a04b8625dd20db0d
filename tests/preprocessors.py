"""What stands for a tower's preprocessing, in a decoder's process too: so it imports little."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opticnerve.media.plan import Plan


def mean_colour(image: Image.Image, plan: Plan) -> NDArray[np.uint8]:
    """uint8 [3]. Like a tower's, it resizes first, and takes little memory of its own."""
    return np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0]
