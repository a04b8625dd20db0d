"""Pixels as Hugging Face's ``load_image`` has them, and refusals that tell nothing of decoders."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from examples.demo_training import scenes
from opticnerve.errors import InvalidMedia, PlanMismatch
from opticnerve.media.decode import decode
from opticnerve.media.plan import Grid, Modality, Plan
from opticnerve.media.probe import parse_structure


def plan_of(data: bytes) -> Plan:
    found = parse_structure(data)
    return Plan(
        modality=Modality.IMAGE,
        format=found.format,
        width=found.width,
        height=found.height,
        orientation=found.orientation,
        resized_width=28,
        resized_height=28,
        grid=Grid(1, 2, 2),
        num_tokens=1,
        num_patches=4,
    )


def reference(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of transparent palettes.
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def noise(mode: str, size: tuple[int, int] = (19, 14)) -> Image.Image:
    rgba = Image.frombytes("RGBA", size, random.Random(5).randbytes(size[0] * size[1] * 4))
    if mode == "PA":
        return rgba.convert("RGBA").quantize(16)
    return rgba.convert(mode)


def save(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


CASES: dict[str, Callable[[], bytes]] = {
    **{
        f"png {mode}": lambda mode=mode: save(noise(mode), "PNG")
        for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
    },
    "png with a transparent colour": lambda: save(noise("RGB"), "PNG", transparency=(1, 2, 3)),
    "jpeg": lambda: save(noise("RGB"), "JPEG"),
    "jpeg grey": lambda: save(noise("L"), "JPEG"),
    "jpeg cmyk": lambda: save(noise("CMYK"), "JPEG"),
    "jpeg progressive": lambda: save(noise("RGB"), "JPEG", progressive=True),
    "webp": lambda: save(noise("RGB"), "WEBP"),
    "webp lossless with alpha": lambda: save(noise("RGBA"), "WEBP", lossless=True),
    "gif": lambda: save(noise("P"), "GIF"),
    "gif transparent": lambda: save(noise("RGBA"), "GIF"),
    "bmp": lambda: save(noise("RGB"), "BMP"),
    "bmp palette": lambda: save(noise("P"), "BMP"),
    "bmp with alpha": lambda: save(noise("RGBA"), "BMP"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_colours_are_those_of_the_reference(name: str) -> None:
    data = CASES[name]()
    picture = decode(data, plan_of(data), background=None)
    assert picture.mode == "RGB"
    assert picture.size == reference(data).size
    assert picture.tobytes() == reference(data).tobytes()


def test_of_16_bit_grey_the_upper_8_bits_count() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    data = save(Image.fromarray(values), "PNG")
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (np.asarray(decode(data, plan_of(data))) == grey[..., None]).all()


# ---- transparency


def blended(data: bytes, background: int) -> Image.Image:
    """As a picture viewer shows it on a sheet of that colour."""
    layer = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    sheet = Image.new("RGBA", layer.size, (*background.to_bytes(3, "big"), 255))
    return Image.alpha_composite(sheet, layer).convert("RGB")


@pytest.mark.parametrize("background", [0xFFFFFF, 0x000000, 0x2040FF])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_the_background_shows_through(name: str, background: int) -> None:
    data = CASES[name]()
    picture = decode(data, plan_of(data), background=background)
    assert picture.mode == "RGB"
    assert picture.tobytes() == blended(data, background).tobytes()
    if not Image.open(io.BytesIO(data)).has_transparency_data:
        assert picture.tobytes() == reference(data).tobytes()


def star(colour: tuple[int, ...], sheet: tuple[int, ...]) -> Image.Image:
    image = Image.new("RGBA" if len(sheet) == 4 else "RGB", (90, 80), sheet)
    points = scenes.outline("star", 45, 40, 30)
    ImageDraw.Draw(image).polygon(points, fill=colour)
    return image


STARS: dict[str, Callable[[], bytes]] = {
    "png": lambda: save(star((0, 0, 0, 255), (0, 0, 0, 0)), "PNG"),
    "png grey": lambda: save(star((0, 0, 0, 255), (0, 0, 0, 0)).convert("LA"), "PNG"),
    "png palette": lambda: save(star((0, 0, 0, 255), (0, 0, 0, 0)).quantize(4), "PNG"),
    "webp": lambda: save(star((0, 0, 0, 255), (0, 0, 0, 0)), "WEBP", lossless=True, exact=True),
    "gif": lambda: save(star((0, 0, 0, 255), (0, 0, 0, 0)), "GIF"),
    "bmp": lambda: bmp_with_alpha(star((0, 0, 0, 255), (0, 0, 0, 0))),
}


def bmp_with_alpha(image: Image.Image) -> bytes:
    """32 bits a pixel, with a header that says which of them are alpha."""
    width, height = image.size
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, width, -height, 1, 32, 3, 0, 0, 0, 0, 0) + masks
    header += bytes(108 - len(header))
    pixels = image.tobytes("raw", "BGRA")
    return b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + header + pixels


@pytest.mark.parametrize("name", STARS)
def test_a_black_star_on_nothing_is_a_black_star_on_white(name: str) -> None:
    """Black is also what is hidden under its transparency."""
    data = STARS[name]()
    expected = star((0, 0, 0), (255, 255, 255))
    assert decode(data, plan_of(data)).tobytes() == expected.tobytes()
    assert np.asarray(decode(data, plan_of(data), background=None)).max() == 0


@pytest.mark.parametrize("name", ["png", "webp", "bmp"])
def test_pixels_with_alpha_are_not_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of the largest size accepted is 360 MB of them."""
    data = STARS[name]()

    def refuse(image: Image.Image) -> Image.Image:
        raise AssertionError(f"a copy in mode {image.mode}")

    monkeypatch.setattr(Image.Image, "copy", refuse)
    assert decode(data, plan_of(data)).size == (90, 80)


def png(depth: int, colour: int, rows: bytes, *chunks: bytes, size: tuple[int, int]) -> bytes:
    """``rows``: each with its filter byte in front. Chunks without a checksum of their own."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [b"IHDR" + header, *chunks, b"IDAT" + zlib.compress(rows), b"IEND"]
    framed = (
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("junk", [0, 1])
def test_one_grey_is_transparent(depth: int, junk: int) -> None:
    """``junk``: bits of the key above the sample's, which do not count."""
    key, other = (1, 0) if depth == 1 else (0x1234 >> (16 - depth), 2)
    key, count = key or 3, 16 // depth
    row = b"".join(
        (sum(value << depth * i for i in range(count)) & 0xFFFF).to_bytes(2, "big")
        for value in (key, other)
    )
    said = struct.pack(">H", key | (junk << depth) & 0xFFFF)
    data = png(depth, 0, b"\0" + row, b"tRNS" + said, size=(2 * count, 1))
    picture = np.asarray(decode(data, plan_of(data), background=0xFF0000))[0]
    assert (picture[:count] == (255, 0, 0)).all()
    grey = other >> 8 if depth == 16 else other * 255 // (2**depth - 1)
    assert (picture[count:] == grey).all()


def test_of_16_bit_colours_all_bits_tell_the_transparent_one() -> None:
    key = (0x0102, 0x0304, 0x0506)
    samples = [key, (0x0102, 0x0304, 0x0507), (0x0202, 0x0304, 0x0506)]
    rows = b"\0" + b"".join(struct.pack(">HHH", *sample) for sample in samples)
    data = png(16, 2, rows, b"tRNS" + struct.pack(">HHH", *key), size=(3, 1))
    picture = np.asarray(decode(data, plan_of(data)))[0].tolist()
    assert picture == [[255, 255, 255], [1, 3, 5], [2, 3, 5]]


@pytest.mark.parametrize(("colour", "channels"), [(4, 2), (6, 4)])
def test_of_16_bit_alpha_the_upper_8_bits_count(colour: int, channels: int) -> None:
    samples = np.random.default_rng(4).integers(0, 2**16, (9, 11, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    data = png(16, colour, rows, size=(11, 9))
    small = (samples >> 8).astype(np.uint8)
    layer = Image.fromarray(small, "LA" if channels == 2 else "RGBA").convert("RGBA")
    sheet = Image.new("RGBA", (11, 9), (255, 255, 255, 255))
    expected = Image.alpha_composite(sheet, layer).convert("RGB")
    assert decode(data, plan_of(data)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("transparent", [False, True])
def test_where_a_gifs_image_leaves_its_screen_empty_the_background_shows(transparent: bool) -> None:
    small = Image.new("P", (4, 3), 1)
    small.putpalette([0, 0, 0, 250, 0, 0])
    data = bytearray(save(small, "GIF", **({"transparency": 0} if transparent else {})))
    data[6:10] = struct.pack("<HH", 8, 8)
    at = data.index(struct.pack("<BHHHH", 0x2C, 0, 0, 4, 3))
    data[at : at + 9] = struct.pack("<BHHHH", 0x2C, 2, 1, 4, 3)
    picture = np.asarray(decode(bytes(data), plan_of(bytes(data))))
    expected = np.full((8, 8, 3), 255, dtype=np.uint8)
    expected[1:4, 2:6] = (250, 0, 0)
    assert (picture == expected).all()


def test_a_bmp_whose_alpha_nobody_set_is_opaque() -> None:
    image = noise("RGB").convert("RGBA")
    image.putalpha(0)
    data = bmp_with_alpha(image)
    assert decode(data, plan_of(data)).tobytes() == noise("RGB").tobytes()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(noise("RGB"), format, exif=exif)
    plan = plan_of(data)
    picture = decode(data, plan)
    assert picture.tobytes() == reference(data).tobytes()
    assert picture.size == parse_structure(data).displayed_size


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_half_a_picture_is_invalid_media(format: str) -> None:
    whole = save(noise("RGB", (64, 64)), format)
    plan = plan_of(whole)
    with pytest.raises(InvalidMedia) as caught:
        decode(whole[: len(whole) // 2], plan)
    assert "Pillow" not in caught.value.message
    assert " at 0x" not in caught.value.message


def test_damaged_pixels_are_invalid_media() -> None:
    data = bytearray(save(noise("RGB", (64, 64)), "PNG"))
    data[200:400] = bytes(200)
    with pytest.raises(InvalidMedia, match="damaged"):
        decode(bytes(data), plan_of(bytes(data)))


@pytest.mark.parametrize(
    "change",
    [{"width": 20}, {"height": 15}, {"orientation": 6}, {"format": "jpeg"}],
    ids=lambda change: next(iter(change)),
)
def test_another_picture_than_planned_is_refused(change: dict[str, object]) -> None:
    data = save(noise("RGB"), "PNG")
    with pytest.raises(PlanMismatch):
        decode(data, replace(plan_of(data), **change))  # type: ignore[arg-type]


def test_bombs_are_refused_before_decoding() -> None:
    data = save(noise("RGB", (200, 200)), "PNG")
    with pytest.raises(InvalidMedia, match="at most 39999"):
        decode(data, plan_of(data), max_pixels=39_999)


def test_pictures_above_pillows_own_limit_are_ours_to_allow() -> None:
    data = save(Image.new("1", (10_000, 9_000)), "PNG")
    plan = replace(plan_of(save(noise("RGB"), "PNG")), width=10_000, height=9_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data, plan, max_pixels=100_000_000).size == (10_000, 9_000)


def test_memoryviews_are_taken() -> None:
    data = save(noise("RGB"), "PNG")
    assert decode(memoryview(data), plan_of(data)).size == (19, 14)
