"""Reads a caller's pictures (bytes, paths, Pillow images) into compressed bytes."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from opticnerve.errors import InvalidRequest
from opticnerve.media.decode import to_rgb, to_rgba

Picture: TypeAlias = bytes | bytearray | memoryview | str | Path | Image.Image
"""Compressed bytes, the path of a file, or a Pillow image."""


def is_picture(value: object) -> bool:
    return isinstance(value, (bytes, bytearray, memoryview, str, Path, Image.Image))


def is_url(picture: object) -> bool:
    """Whether ``picture`` is a URL, which a gateway reads, and not a path."""
    scheme = picture.partition(":")[0].lower() if isinstance(picture, str) else ""
    return scheme in ("http", "https", "data")


def read_picture(picture: Picture) -> bytes:
    """The compressed bytes. A Pillow image becomes a PNG, without loss and in the image's own
    orientation.

    Raises InvalidRequest for a path that cannot be read, and for another type.
    """
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    if isinstance(picture, Image.Image):
        return _png(picture)
    if isinstance(picture, (str, Path)):
        if is_url(picture):
            raise InvalidRequest("only a gateway reads URLs: give a path, or the picture's bytes")
        try:
            return Path(os.path.expanduser(picture)).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path.
            why = getattr(error, "strerror", None) or str(error)
            raise InvalidRequest(f"cannot read the picture {picture!s:.200}: {why}") from error
    raise InvalidRequest(
        "a picture is bytes, a path or a Pillow image (Image.fromarray makes one of an array), "
        f"not {type(picture).__name__}"
    )


def _png(image: Image.Image) -> bytes:
    """A PNG without metadata: a reader would apply EXIF's orientation."""
    plain = to_rgba(image) if image.has_transparency_data else to_rgb(image)
    plain.info = {}
    buffer = io.BytesIO()
    plain.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
