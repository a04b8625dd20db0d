"""From a decoded picture to a tower's floats: numpy and Pillow, no torch.

Equal, bit by bit, to the Pillow-backed Hugging Face image processors: an 8-bit value has only 256
outcomes in each channel, so rescaling and normalising are one look-up. Pillow's resize and the
look-up run without the interpreter's lock, several pictures at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opticnerve.errors import PlanMismatch

if TYPE_CHECKING:
    from opticnerve.checkpoints.settings import PixelSettings
    from opticnerve.media.plan import Plan


def value_table(pixels: PixelSettings) -> NDArray[np.float32]:
    """float32 [3, 256]: what each 8-bit value of each channel becomes.

    Rescaled in double, stored as float, then normalised in float, as the reference does.
    """
    values = np.arange(256, dtype=np.float64)
    if pixels.do_rescale:
        values = values * pixels.rescale_factor
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if pixels.do_normalize:
        mean, std = (
            np.array(part, dtype=np.float32)[:, None] for part in (pixels.mean, pixels.std)
        )
        table = (table - mean) / std
    return table


def resize(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """``image`` at that size, in 8-bit RGB."""
    if image.mode != "RGB":
        raise PlanMismatch(f"the picture is in mode {image.mode}, not RGB")
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling(resample))


def check_size(image: Image.Image, plan: Plan) -> None:
    """Raises PlanMismatch unless ``image`` has the plan's displayed size."""
    size = (plan.width, plan.height) if plan.orientation < 5 else (plan.height, plan.width)
    if image.size != size:
        raise PlanMismatch(
            f"the decoded picture is {image.size[0]}x{image.size[1]}, "
            f"its header said {size[0]}x{size[1]}"
        )


class Patchify:
    """A ``Preprocessor`` for towers that take patches of any grid, ordered by merge blocks.

    Returns float32 [h * w, channels * temporal_patch_size * patch_size²]: rows run over merge
    blocks, then over the patches of a block; a still picture is its own next frame.
    """

    def __init__(
        self, pixels: PixelSettings, patch_size: int, merge_size: int, temporal_patch_size: int
    ) -> None:
        self.resample = pixels.resample
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.temporal_patch_size = temporal_patch_size
        self._table = value_table(pixels)

    def __call__(self, image: Image.Image, plan: Plan) -> NDArray[np.float32]:
        check_size(image, plan)
        image = resize(image, plan.resized_width, plan.resized_height, self.resample)
        h, w, merge, side = plan.grid.h, plan.grid.w, self.merge_size, self.patch_size
        blocks = np.asarray(image).reshape(h // merge, merge, side, w // merge, merge, side, 3)
        patches = np.ascontiguousarray(blocks.transpose(6, 0, 3, 1, 4, 2, 5))  # [3, h/m, w/m, m…]
        frames = self.temporal_patch_size
        out = np.empty((h * w, 3, frames, side * side), dtype=np.float32)
        for channel in range(3):
            values = np.take(self._table[channel], patches[channel]).reshape(h * w, 1, side * side)
            out[:, channel] = values
        return out.reshape(h * w, -1)


class CenterCrop:
    """A ``Preprocessor`` for towers that take one square: shortest edge resized, centre cut out.

    Returns float32 [1, 3, height, width].
    """

    def __init__(
        self, pixels: PixelSettings, resized_size: Callable[[int, int], tuple[int, int]]
    ) -> None:
        """``resized_size``: (width, height) of a picture -> (width, height) before the crop."""
        self.resample = pixels.resample
        self.resized_size = resized_size
        self._table = value_table(pixels)

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
