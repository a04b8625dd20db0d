"""A picture's structure: format, size, orientation, frames. No pixel is decoded.

The format is recognised by the bytes, not by a name or a content type.
"""

from __future__ import annotations

from collections.abc import Callable

from opticnerve.errors import InvalidMedia
from opticnerve.media.formats import bmp, gif, jpeg, png, webp
from opticnerve.media.plan import DEFAULT_MAX_PASSES, DEFAULT_MAX_PIXELS, Structure

SUPPORTED = "PNG, JPEG, WebP, GIF and BMP are supported"

_HEAD_BYTES = 64


def parse_structure(
    data: bytes | memoryview,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_passes: int = DEFAULT_MAX_PASSES,
    *,
    allow_animation: bool = False,
) -> Structure:
    """The structure of a picture, which may have ``max_pixels`` pixels and the decode cost
    ``max_passes`` (see ``Structure.decode_cost``) at most.

    Raises InvalidMedia, and nothing else, for bytes that are no picture of a supported format, or
    that are cut short or damaged before the pixels; for a picture without pixels, too large or too
    costly to decode; and for an animation without ``allow_animation``. Messages never quote the
    bytes.
    """
    structure = _parser(data)(data)
    width, height = structure.width, structure.height
    if width == 0 or height == 0:
        raise InvalidMedia("the picture has no pixels: its width or height is 0")
    if width * height > max_pixels:
        raise InvalidMedia(
            f"the picture is {width}x{height}, {width * height} pixels, and at most {max_pixels} "
            "are accepted; send a smaller one",
            code="image_too_large",
        )
    if structure.frames > 1 and not allow_animation:
        raise InvalidMedia(
            f"the {structure.format.upper()} picture is animated, which makes it a video; send "
            "one still frame of it, or several frames as pictures",
            code="animated_image",
        )
    if structure.decode_cost > max_passes:
        raise InvalidMedia(
            f"decode cost of the {structure.format.upper()} picture is {structure.decode_cost} "
            f"pixel-passes, for {width * height} pixels; limit {max_passes}. Save it "
            f"{_CHEAPER.get(structure.format, 'smaller')}",
            code="image_too_costly",
        )
    return structure


_CHEAPER = {
    "jpeg": "as a baseline JPEG (not progressive) without metadata, or smaller",
    "png": "with 8 bits a sample, not interlaced and without metadata, or smaller",
    "bmp": "without run-length compression, or smaller",
}


def _parser(data: bytes | memoryview) -> Callable[[bytes | memoryview], Structure]:
    head = bytes(data[:_HEAD_BYTES])
    if head.startswith(png.MAGIC):
        return png.read_structure
    if head.startswith(jpeg.MAGIC):
        return jpeg.read_structure
    if webp.matches(head):
        return webp.read_structure
    if head.startswith(gif.MAGIC):
        return gif.read_structure
    if head.startswith(bmp.MAGIC):
        return bmp.read_structure
    if not head:
        raise InvalidMedia(f"the picture is empty; {SUPPORTED}")
    kind = _name(head)
    found = f"the bytes are {kind}" if kind else "the bytes are no known picture format"
    raise InvalidMedia(f"{found}; {SUPPORTED}", code="unsupported_image_format")


def _name(head: bytes) -> str | None:
    """The name of another format, for the message; None if it is not known."""
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in (b"avif", b"avis"):
            return "an AVIF picture"
        if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
            return "a HEIC picture"
        return "a video (MP4)"
    for prefix, name in _OTHERS:
        if head.startswith(prefix):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if text.startswith((b"<svg", b"<?xml")):
        return "an SVG or XML document"
    return None


_OTHERS = (
    (b"II\x2a\x00", "a TIFF picture"),
    (b"MM\x00\x2a", "a TIFF picture"),
    (b"II\x2b\x00", "a TIFF picture"),
    (b"MM\x00\x2b", "a TIFF picture"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL picture"),
    (b"8BPS", "a Photoshop document"),
    (b"%PDF", "a PDF document"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"RIFF", "a RIFF file (audio or video)"),
    (b"\x1aE\xdf\xa3", "a video (WebM or Matroska)"),
    (b"OggS", "an Ogg file"),
    (b"ID3", "an MP3 file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "compressed with gzip"),
)
