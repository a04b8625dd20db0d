"""Shared by all families: processor settings, plans of pictures, and checks of their sizes.

Uses Pillow and no torch. Pillow releases the GIL while it resizes, so threads resize in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from opticnerve.errors import CheckpointError, InvalidMedia, InvalidRequest, PlanMismatch
from opticnerve.media.plan import Grid, Modality, Overrides, Plan, SpanAttention, Structure

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


def check_agreed(settings: Mapping[str, Any], name: str, of_model: str, value: Any) -> None:
    """Raises CheckpointError if the processor's ``settings`` give ``name`` another value than
    ``value``, the model's. ``of_model`` names the model's setting: "the vision tower's
    patch_size"."""
    found = settings.get(name)
    if found not in (None, value) or isinstance(found, bool):
        raise CheckpointError(
            f"the processor's {name} is {found!r} but {of_model} is {value!r}; the files are not "
            "of one checkpoint"
        )


def check_overrides(overrides: Overrides) -> None:
    """Raises InvalidRequest for bounds that no picture can meet. Every layout's ``plan`` calls this
    first."""
    low, high = overrides.min_pixels, overrides.max_pixels
    for name, bound in (("min_pixels", low), ("max_pixels", high)):
        if bound is not None and bound < 1:
            raise InvalidRequest(f"{name} must be at least 1", param=name)
    if low is not None and high is not None and low > high:
        raise InvalidRequest(
            f"min_pixels ({low}) is larger than max_pixels ({high})", param="min_pixels"
        )


def check_aspect(width: int, height: int) -> None:
    """Raises InvalidMedia for an aspect ratio with which the resized picture would be enormous, or
    a single row of patches."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidMedia(
            f"the picture is {width}x{height}: one side is more than {MAX_ASPECT} times the "
            "other; crop it or send it in pieces"
        )


def picture_plan(
    structure: Structure,
    resized: tuple[int, int],
    grid: Grid,
    num_tokens: int,
    attention: SpanAttention = SpanAttention.CAUSAL,
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
        attention=attention,
    )


def resize(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """``image`` resized to (width, height), 8-bit RGB. ``resample``: a ``PIL.Image.Resampling``
    value. Raises PlanMismatch for an image in another mode."""
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
