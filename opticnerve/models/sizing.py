"""What layouts share: refusals, and the plan of a still picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opticnerve.errors import CheckpointError, InvalidMedia
from opticnerve.media.plan import Grid, Modality, Plan, Structure

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

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
        passes=structure.passes,
        is_heavy=structure.is_heavy,
    )
