"""Pixels as Hugging Face's ``load_image`` has them, and refusals that tell nothing of decoders."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from opticnerve.errors import InvalidMedia, PlanMismatch
from opticnerve.media.decode import decode
from opticnerve.media.plan import Grid, Modality, Plan
from opticnerve.media.structure import parse_structure


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
    picture = decode(data, plan_of(data))
    assert picture.mode == "RGB"
    assert picture.size == reference(data).size
    assert picture.tobytes() == reference(data).tobytes()


def test_of_16_bit_grey_the_upper_8_bits_count() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    data = save(Image.fromarray(values), "PNG")
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (np.asarray(decode(data, plan_of(data))) == grey[..., None]).all()


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
