"""Bytes to pixels, as the plan says. Runs in the encoder's CPU pool."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from opticnerve.errors import InvalidMedia, PlanMismatch
from opticnerve.media.formats import jpeg, png, webp
from opticnerve.media.plan import DEFAULT_MAX_PASSES, DEFAULT_MAX_PIXELS, WHITE, Plan
from opticnerve.media.probe import parse_structure

# Pillow's own limit warns at one size and raises at twice that. Ours is a setting, and is checked
# before Pillow gets the bytes.
Image.MAX_IMAGE_PIXELS = None

_PNG_DEPTH = 24  # Offset of the bits per sample in a PNG's header.
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
    data: bytes | memoryview,
    plan: Plan,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    background: int | None = WHITE,
    max_passes: int = DEFAULT_MAX_PASSES,
) -> Image.Image:
    """The picture as RGB, upright, of the plan's displayed size.

    ``background``, 0xRRGGBB, shows through transparent pixels, blended as by Pillow's
    ``alpha_composite``. With None, and for opaque pictures, colours are those of Hugging Face's
    ``load_image``: ``convert("RGB")``, which drops transparency. Only 16-bit grey differs, see
    ``to_rgb``. Raises InvalidMedia for bytes that do not decode, PlanMismatch for a picture other
    than the plan's. Messages do not show the decoder's errors.
    """
    check_plan(data, plan, max_pixels, max_passes)
    try:
        picture = _decode(_strip(data, plan.format), plan, background)
    except (InvalidMedia, MemoryError):
        raise
    except Exception as error:  # Decoders raise whatever their parsers raise.
        raise InvalidMedia(
            f"the {plan.format.upper()} picture is damaged or cut short and cannot be decoded; "
            "save it again or send all of its bytes"
        ) from error
    turn = _TURNS.get(plan.orientation)
    return picture if turn is None else picture.transpose(turn)


def _decode(data: bytes | memoryview, plan: Plan, background: int | None) -> Image.Image:
    """The picture as RGB in its stored orientation. Frees the decoder's memory."""
    with Image.open(io.BytesIO(data), formats=[plan.format.upper()]) as image:
        if image.size != (plan.width, plan.height):
            raise _mismatch(plan, *image.size)
        return _opaque(image) if background is None else _flatten(image, data, background)


def _opaque(image: Image.Image) -> Image.Image:
    """As ``to_rgb``, without a copy of an RGB picture, which may take hundreds of megabytes."""
    if image.mode != "RGB":
        return to_rgb(image)
    image.load()
    return image


def _strip(data: bytes | memoryview, format: str) -> bytes | memoryview:
    """The file without parts that the picture does not need, and that could slow or fail
    decoding."""
    strip = {"jpeg": jpeg.strip, "png": png.strip, "webp": webp.strip}.get(format)
    return data if strip is None else strip(data)


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy without transparency. 16-bit grey keeps its upper 8 bits, like every other 16-bit PNG;
    Pillow's conversion would make all values above 255 white, nearly the whole picture."""
    if image.mode.startswith("I;16") or (image.mode == "I" and _is_16_bit(image)):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether an image of 32-bit integers, as callers may pass, holds 16-bit grey, not 8-bit."""
    lowest, highest = np.asarray(image).min(initial=0), np.asarray(image).max(initial=0)
    return bool(lowest >= 0 and 255 < highest < 2**16)


def to_rgba(image: Image.Image) -> Image.Image:
    """A copy with an alpha channel, however ``image`` describes its transparency."""
    if image.mode == "La":  # Pillow converts it to this mode only.
        image = image.convert("LA")
    return image.convert("RGBA")


def _flatten(image: ImageFile.ImageFile, data: bytes | memoryview, background: int) -> Image.Image:
    """``image``, just opened from ``data``, over a background of that colour."""
    screen = box = (0, 0, *image.size)
    if image.format == "GIF" and image.tile:
        box = image.tile[0][1] or box  # The frame may cover only a part of the screen.
    if box == screen and not image.has_transparency_data:
        return _opaque(image)
    # An RGBA picture is only read, so it is not copied, which may take hundreds of megabytes.
    layer = image if image.mode == "RGBA" else _with_exact_key(image, data)
    if image.format == "BMP" and layer.getchannel("A").getextrema() == (0, 0):
        return to_rgb(image)  # Some programs leave alpha unset in an opaque picture.
    sheet = Image.new("RGB", image.size, tuple(background.to_bytes(3)))
    layer = layer if box == screen else layer.crop(box)
    sheet.paste(layer, box, mask=layer)
    return sheet


def _with_exact_key(image: Image.Image, data: bytes | memoryview) -> Image.Image:
    """The picture as RGBA. A PNG's transparent colour is compared with the samples as stored, which
    have 2, 4 or 16 bits; Pillow compares it with its own 8-bit samples."""
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode in ("P", "RGBA", "LA") or key is None:
        return to_rgba(image)
    depth = data[_PNG_DEPTH]
    keys = [value & (2**depth - 1) for value in (key if isinstance(key, tuple) else (key,))]
    if depth == 16:
        layer = to_rgb(image)
        layer.putalpha(Image.fromarray(_differs(image, data, keys)))
        return layer
    if image.mode == "L":
        image.info["transparency"] = keys[0] * 255 // (2**depth - 1)
    elif image.mode == "RGB":
        image.info["transparency"] = tuple(keys)
    return to_rgba(image)


def _differs(image: Image.Image, data: bytes | memoryview, keys: list[int]) -> NDArray[np.uint8]:
    """uint8 [height, width], 255 where a pixel of 16-bit samples is not of the colour ``keys``."""
    if len(keys) == 1:
        return np.where(np.asarray(image) == keys[0], 0, 255).astype(np.uint8)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
        coder, box, offset, _ = again.tile[0]
        again.tile = [ImageFile._Tile(coder, box, offset, "RGB;16L")]  # The lower bytes.
        low = np.asarray(again)
    high = np.asarray(image)
    differs = np.zeros(high.shape[:2], dtype=bool)
    for channel, key in enumerate(keys):
        differs |= high[..., channel] != key >> 8
        differs |= low[..., channel] != key & 0xFF
    return np.where(differs, 255, 0).astype(np.uint8)


def check_plan(
    data: bytes | memoryview,
    plan: Plan,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_passes: int = DEFAULT_MAX_PASSES,
) -> None:
    """Raises InvalidMedia or PlanMismatch unless ``plan`` fits the structure of ``data``."""
    structure = parse_structure(data, max_pixels, max_passes)
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
