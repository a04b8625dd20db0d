"""What families share about pictures: their plans, and the way from pixels to a tower's floats.

With numpy and Pillow, no torch. The floats equal those of the Pillow-backed Hugging Face image
processors bit by bit. An 8-bit value has only 256 outcomes in each channel, so rescaling and
normalising are one look-up. Pillow's resize and the look-up run without the interpreter's lock,
several pictures at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opticnerve.errors import CheckpointError, InvalidMedia, PlanMismatch
from opticnerve.media.plan import Grid, Modality, Plan, Structure

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.checkpoints.json_files import PixelSettings

MAX_ASPECT = 200  # The long side over the short one.


def processor_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The image processor's settings. Raises CheckpointError for a checkpoint without them."""
    if not checkpoint.processor_config:
        raise CheckpointError(
            f"{checkpoint.path} has no preprocessor_config.json; fetch it from where the "
            "checkpoint was published"
        )
    return checkpoint.processor_config


def check_aspect(width: int, height: int) -> None:
    """Raises InvalidMedia for a picture so long that it would become enormous, or a single row."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidMedia(
            f"the picture is {width}x{height}: one side is more than {MAX_ASPECT} times the "
            "other; crop it or send it in pieces"
        )


def picture_plan(
    structure: Structure, resized: tuple[int, int], grid: Grid, num_tokens: int
) -> Plan:
    """The plan of a picture that the tower sees at ``resized`` (width, height)."""
    return Plan(
        modality=Modality.IMAGE,
        format=structure.format,
        width=structure.width,
        height=structure.height,
        orientation=structure.orientation,
        resized_width=resized[0],
        resized_height=resized[1],
        grid=grid,
        num_tokens=num_tokens,
        num_patches=grid.num_patches,
        decode_cost=structure.decode_cost,
        is_heavy=structure.is_heavy,
    )


def value_table(pixels: PixelSettings) -> NDArray[np.float32]:
    """float32 [3, 256]: the outcome of each 8-bit value in each channel.

    As in the reference, values are rescaled in float64, stored as float32 and normalised in
    float32.
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
