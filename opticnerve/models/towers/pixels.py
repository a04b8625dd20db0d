"""A tower's first step: 8-bit pixels, channels last, become floats on its device.

Rescaling, normalising and the conversion are one look-up, since an 8-bit value has only 256
outcomes in each channel. The floats equal those of Hugging Face's image processors bit by bit. What
is decoded, kept and uploaded is an eighth as large as float32 pixels with a doubled frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from opticnerve.errors import PlanMismatch

if TYPE_CHECKING:
    from opticnerve.checkpoints.json_files import PixelSettings


class PixelTable:
    """The float for each 8-bit value in each channel, in ``dtype`` on ``device``."""

    def __init__(
        self, settings: PixelSettings, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._values = torch.from_numpy(value_table(settings)).flatten().to(device, dtype)
        self._channels = torch.arange(0, 768, 256, dtype=torch.int32, device=device)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [..., width, 3], red first -> floats of the same shape."""
        channels = self._channels.repeat(pixels.shape[-2])  # Adding to long rows is faster.
        places = pixels.flatten(-2) + channels
        return self._values.index_select(0, places.flatten()).view(pixels.shape)


def value_table(settings: PixelSettings) -> NDArray[np.float32]:
    """float32 [3, 256]: the outcome of each 8-bit value in each channel.

    As in Hugging Face's Pillow-backed processors, values are rescaled in float64, stored as float32
    and normalised in float32.
    """
    values = np.arange(256, dtype=np.float64)
    if settings.do_rescale:
        values = values * settings.rescale_factor
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if settings.do_normalize:
        mean, std = (
            np.array(part, dtype=np.float32)[:, None] for part in (settings.mean, settings.std)
        )
        table = (table - mean) / std
    return table


def check_pixels(pixels: NDArray[Any], *shape: int) -> None:
    """Raises PlanMismatch unless ``pixels`` are uint8 of ``shape``, which follows from the plan."""
    if pixels.dtype != np.uint8 or pixels.shape != shape:
        raise PlanMismatch(
            f"pixels of shape {list(pixels.shape)} in {pixels.dtype} where the plan has "
            f"{list(shape)} in uint8"
        )


def upload(pixels: Sequence[NDArray[np.uint8]], device: torch.device) -> torch.Tensor:
    """``pixels`` one after the other along their first axis, in one copy to ``device``."""
    shape = (sum(len(item) for item in pixels), *pixels[0].shape[1:])
    batch = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.concatenate(pixels, out=batch.numpy())
    return batch.to(device, non_blocking=True)
