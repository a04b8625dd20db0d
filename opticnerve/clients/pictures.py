"""Pictures as a program has them, made ready for an encoder: bytes, plan, key. No transport."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from opticnerve.clients.checks import UINT64, check_integer
from opticnerve.errors import InvalidRequest
from opticnerve.media.keys import content_key
from opticnerve.media.plan import Overrides, Plan
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
        buffer = io.BytesIO()
        # As the encoder would decode it; without its EXIF, whose turn a PNG reader would apply.
        picture.convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    if isinstance(picture, (str, Path)):
        try:
            return Path(picture).expanduser().read_bytes()
        except OSError as error:
            raise InvalidRequest(f"cannot read the picture {picture}: {error.strerror}") from error
    raise InvalidRequest(
        f"a picture is bytes, a path or a Pillow image, not {type(picture).__name__}"
    )


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
    for name in ("min_pixels", "max_pixels"):
        if (pixels := getattr(overrides, name)) is not None:
            check_integer(name, pixels, UINT64)
    plan = layout.plan(parse_structure(data), overrides)
    key = content_key(data, layout.settings(), overrides, fingerprint)
    return PlannedPicture(data, key, plan, overrides, fingerprint)
