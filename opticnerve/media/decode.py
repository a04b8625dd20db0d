"""Bytes to pixels, as the plan says and no other way. Runs in the encoder's CPU pool."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from opticnerve.errors import InvalidMedia, PlanMismatch
from opticnerve.media.plan import Plan
from opticnerve.media.structure import DEFAULT_MAX_PIXELS, parse_structure

# Pillow's own limit warns at some size and raises at twice that. Ours is checked before Pillow
# sees the bytes, and is a setting.
Image.MAX_IMAGE_PIXELS = None

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    data: bytes | memoryview, plan: Plan, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Image.Image:
    """The picture as RGB, upright, of the plan's displayed size.

    Colour as Hugging Face's ``load_image``: ``convert("RGB")``, which drops transparency. Only
    grey of 16 bits differs: see ``_rgb``.
    Raises InvalidMedia for bytes that do not decode, PlanMismatch for a picture other than the
    plan's. Messages tell nothing of the decoder.
    """
    check_plan(data, plan, max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=[plan.format.upper()]) as image:
            if image.size != (plan.width, plan.height):
                raise _mismatch(plan, *image.size)
            picture = _rgb(image)
    except (InvalidMedia, MemoryError):
        raise
    except Exception as error:  # Decoders raise whatever their parsers raise.
        raise InvalidMedia(
            f"the {plan.format.upper()} picture is damaged or cut short and cannot be decoded; "
            "save it again or send all of its bytes"
        ) from error
    turn = _TURNS.get(plan.orientation)
    return picture if turn is None else picture.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """Of 16-bit grey the upper 8 bits count, as of every other 16-bit PNG. Pillow's own conversion
    makes all values above 255 white, which is nearly the whole of such a picture."""
    if image.mode.startswith("I"):  # "I;16", or "I" in earlier Pillows.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def check_plan(data: bytes | memoryview, plan: Plan, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
    """Raises InvalidMedia or PlanMismatch unless ``plan`` was made from these bytes' structure."""
    structure = parse_structure(data, max_pixels)
    if structure.format != plan.format:
        raise PlanMismatch(
            f"the plan is for a {plan.format} picture but the bytes are {structure.format}"
        )
    if (structure.width, structure.height) != (plan.width, plan.height):
        raise _mismatch(plan, structure.width, structure.height)
    if structure.orientation != plan.orientation:
        raise PlanMismatch(
            f"the plan has orientation {plan.orientation} but the picture {structure.orientation}"
        )


def _mismatch(plan: Plan, width: int, height: int) -> PlanMismatch:
    return PlanMismatch(
        f"the plan is for {plan.width}x{plan.height} pixels but the picture has {width}x{height}"
    )
