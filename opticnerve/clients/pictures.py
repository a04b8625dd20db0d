"""Pictures as a program has them, made ready for an encoder: bytes, plan, key. No transport."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from opticnerve.clients.checks import UINT64, check_integer
from opticnerve.errors import InvalidRequest
from opticnerve.media.decode import to_rgb, to_rgba
from opticnerve.media.keys import content_key
from opticnerve.media.plan import WHITE, Overrides, Plan
from opticnerve.media.structure import parse_structure
from opticnerve.models.family import Layout

Picture: TypeAlias = bytes | bytearray | memoryview | str | Path | Image.Image
"""Compressed bytes, the path of a file, or a Pillow image."""

NO_OVERRIDES = Overrides()


def is_picture(value: object) -> bool:
    return isinstance(value, (bytes, bytearray, memoryview, str, Path, Image.Image))


def read_picture(picture: Picture) -> bytes:
    """The compressed bytes. A Pillow image becomes a PNG, upright as it stands, without loss.

    Raises InvalidRequest for a path that cannot be read and for what is no picture at all.
    """
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    if isinstance(picture, Image.Image):
        return _png(picture)
    if isinstance(picture, (str, Path)):
        if str(picture).startswith(("http:", "https:", "data:")):
            raise InvalidRequest(
                "URLs are read by a gateway alone: give a path, or the bytes that you read"
            )
        try:
            return Path(os.path.expanduser(picture)).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a zero in the path.
            why = getattr(error, "strerror", None) or str(error)
            raise InvalidRequest(f"cannot read the picture {picture!s:.200}: {why}") from error
    raise InvalidRequest(
        "a picture is bytes, a path or a Pillow image (Image.fromarray makes one of an array), "
        f"not {type(picture).__name__}"
    )


def _png(image: Image.Image) -> bytes:
    """What shows and what is transparent, and no EXIF, whose turn a PNG reader would apply."""
    plain = to_rgba(image) if image.has_transparency_data else to_rgb(image)
    plain.info = {}
    buffer = io.BytesIO()
    plain.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class PlannedPicture:
    """One picture, ready to be sent to the encoder of ``fingerprint``."""

    data: bytes
    key: str
    plan: Plan
    overrides: Overrides
    fingerprint: str


def plan_picture(
    data: bytes, layout: Layout, fingerprint: str, overrides: Overrides = NO_OVERRIDES
) -> PlannedPicture:
    """Reads the structure, plans, and names. Raises InvalidMedia, InvalidRequest."""
    for name, most in (("min_pixels", UINT64), ("max_pixels", UINT64), ("background", WHITE)):
        if (value := getattr(overrides, name)) is not None:
            check_integer(name, value, most)
    plan = layout.plan(parse_structure(data), overrides)
    key = content_key(data, layout.settings(), overrides, fingerprint)
    return PlannedPicture(data, key, plan, overrides, fingerprint)
