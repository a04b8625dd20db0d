"""What decoding a picture will take, told from its structure and held against what it takes."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from opticnerve.errors import InvalidMedia
from opticnerve.media.decode import decode
from opticnerve.media.plan import DEFAULT_MAX_PASSES, DEFAULT_MAX_PIXELS, Structure
from opticnerve.media.probe import parse_structure
from tests import hostile
from tests.decoders import plan_of
from tests.hostile import save

pytestmark = pytest.mark.slow

ANY = 10**15


def structure(data: bytes) -> Structure:
    return parse_structure(data, ANY, ANY)


def cpu_s(data: bytes) -> float:
    """Of decoding; the least of three."""
    plan = plan_of(data)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        decode(data, plan, ANY, max_passes=ANY)
        seconds.append(time.process_time() - started)
    return min(seconds)


def photo(width: int = 1200, height: int = 800) -> Image.Image:
    random = np.random.default_rng(3)
    blocks = Image.fromarray(random.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    smooth = np.asarray(blocks.resize((width, height)), dtype=np.int16)
    return Image.fromarray(
        (smooth + random.integers(-9, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
    )


def sequential_scans(count: int) -> bytes:
    """A JPEG whose components come in scans of their own, again and again."""
    data = save(photo(), "JPEG", subsampling=0)
    at = data.index(b"\xff\xda")
    scans = b"".join(
        b"\xff\xda\x00\x08\x01" + bytes((part, 0x11 * (part > 1))) + b"\x00\x3f\x00" + bytes(20_000)
        for part in (1, 2, 3) * count
    )
    return data[:at] + scans + b"\xff\xd9"


def arithmetic() -> bytes:
    data = save(photo(), "JPEG")
    at = data.index(b"\xff\xc0")
    coded = data.index(b"\xff\xda")
    noise = np.random.default_rng(1).integers(0, 255, 200_000, dtype=np.uint8).tobytes()
    return data[:at] + b"\xff\xc9" + data[at + 2 : coded + 14] + noise + b"\xff\xd9"


def interlaced_png() -> bytes:
    data = zlib.compress(bytes(4_200_000), 1)
    whole = bytearray(hostile.png(2000, 2000, data=data))
    whole[28] = 1
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


def tables(count: int) -> bytes:
    data = save(photo(64, 64), "JPEG")
    return data[:2] + (b"\xff\xdb\x00\x43\x00" + bytes([1] * 64)) * count + data[2:]


PICTURES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: save(photo(), "JPEG"),
    "jpeg of high quality": lambda: save(photo(), "JPEG", quality=98, subsampling=0),
    "jpeg progressive": lambda: save(photo(), "JPEG", progressive=True),
    "jpeg of many scans": lambda: hostile.many_scans(60, (1200, 800)),
    "jpeg of sequential scans": lambda: sequential_scans(20),
    "jpeg arithmetic": arithmetic,
    "jpeg of many tables": lambda: tables(20_000),
    "png": lambda: save(photo(), "PNG", compress_level=1),
    "png with alpha": lambda: save(photo().convert("RGBA"), "PNG", compress_level=1),
    "png interlaced": interlaced_png,
    "webp": lambda: save(photo(), "WEBP", quality=95),
    "webp lossless": lambda: save(photo(), "WEBP", lossless=True, method=0, quality=0),
    "webp of one colour": lambda: hostile.one_colour_webp(3000, 1000),
    "gif": lambda: save(photo().convert("P"), "GIF"),
    "bmp": lambda: save(photo(), "BMP"),
    "bmp in runs": lambda: hostile.run_length_bmp(600, 400),
}


@pytest.fixture(scope="module")
def pass_s() -> float:
    """What a pixel of an ordinary JPEG takes on this machine."""
    data = save(photo(2400, 1600), "JPEG")
    return cpu_s(data) / structure(data).decode_cost


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_work_is_foreseen(name: str, pass_s: float) -> None:
    """Within a wide margin, for CPUs differ and are busy: without what is counted here, hostile
    files are off by a hundred times and more."""
    data = PICTURES[name]()
    foreseen = structure(data).decode_cost * pass_s
    try:
        taken = cpu_s(data)
    except InvalidMedia:
        pytest.skip("this Pillow decodes none of it")
    assert taken < 4 * foreseen + 0.01
    assert foreseen < 40 * taken + 0.01


def test_a_jpeg_of_a_thousand_scans_is_refused_unread() -> None:
    data = hostile.many_scans(1000)
    assert len(data) < 500_000 and structure(data).decode_cost > 12_000_000 * 1000
    started = time.process_time()
    with pytest.raises(InvalidMedia, match="baseline JPEG") as caught:
        parse_structure(data)
    assert time.process_time() - started < 1  # Milliseconds; it would be a minute to decode.
    assert caught.value.code == "image_too_costly"


def test_scans_are_counted_wherever_they_hide() -> None:
    plain = hostile.many_scans(0, (640, 480))
    end = plain.rindex(b"\xff\xd9")
    scan = plain[plain.rindex(b"\xff\xda") : end]
    usual = structure(plain).decode_cost
    comment = b"\xff\xfe\x00\x06\xff\xd9\xff\xda"  # What it says is no end, and no scan.
    hidden = plain[:end] + (comment + b"\xff\xff" + scan) * 50 + b"\xff\xd9"
    reserved = plain[:end] + b"\xff\x02\xff\xff" + scan * 50 + b"\xff\xd9"
    behind = plain + scan * 50
    big = plain[:end] + b"\xff\x00\xff\xd0" * 600_000 + scan * 50 + b"\xff\xd9"
    assert structure(hidden).decode_cost > usual + 50 * 640 * 480
    assert structure(reserved).decode_cost > usual + 50 * 640 * 480
    assert structure(big).decode_cost > usual + 50 * 640 * 480
    assert structure(behind).decode_cost < usual + 640 * 480


def test_pictures_as_they_are_saved_are_accepted_up_to_the_largest() -> None:
    """Ten scans of 89 megapixels."""
    data = bytearray(hostile.many_scans(0, (64, 64)))
    at, end = data.index(b"\xff\xc2"), data.rindex(b"\xff\xd9")
    data[at + 5 : at + 9] = struct.pack(">HH", 9459, 9459)
    data[end:end] = bytes(20_000_000)
    assert parse_structure(data).decode_cost < DEFAULT_MAX_PASSES
    assert 9459 * 9459 < DEFAULT_MAX_PIXELS < 9460 * 9460


def bmp_of(width: int, height: int) -> bytes:
    data = bytearray(save(Image.new("RGB", (4, 4)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(save(Image.new("P", (4, 4)), "GIF"))
    at = data.index(struct.pack("<BHHHH", 0x2C, 0, 0, 4, 4))
    data[at : at + 9] = struct.pack("<BHHHH", 0x2C, 0, 0, width, height)
    return bytes(data)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(save(Image.new("RGB", (4, 4)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def lossy_webp_of(width: int, height: int) -> bytes:
    data = bytearray(save(Image.new("RGB", (4, 4)), "WEBP"))
    data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        hostile.png(9000, 9000, data=zlib.compress(bytes(1000))),
        jpeg_of(9000, 9000),
        lossy_webp_of(9000, 9000),
        gif_of(9000, 9000),
        bmp_of(9000, 9000),
    ],
    ids=["png", "jpeg", "webp", "gif", "bmp"],
)
def test_data_that_cannot_hold_the_pixels_are_refused(data: bytes) -> None:
    assert len(data) < 2000
    with pytest.raises(InvalidMedia, match="cannot hold the pixels") as caught:
        parse_structure(data)
    assert caught.value.code == "truncated_image"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_emptiest_pictures_hold_their_pixels(format: str) -> None:
    for mode, size in (("L", (3000, 2000)), ("RGB", (2000, 3000)), ("1", (4000, 4000))):
        if mode == "1" and format not in ("PNG", "BMP"):
            continue
        data = save(Image.new(mode, size), format)
        assert structure(data).width == size[0]
    assert structure(save(Image.new("L", (3000, 3000)), "JPEG", progressive=True)).height == 3000


def test_a_picture_of_no_bytes_is_counted_in_full() -> None:
    found = structure(hostile.one_colour_webp(16_383, 5_461))
    assert found.decode_cost > 89_000_000 and found.memory > 1_400_000_000


def compressed_text(kind: bytes) -> bytes:
    """Of a megabyte; not UTF-8, which Pillow keeps without counting it."""
    text = zlib.compress(b"\xff" * 2**20)
    if kind == b"iTXt":
        return b"iTXtk\0\x01\0\0\0" + text
    return kind + b"k\0\0" + text


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_metadata_of_a_png_are_not_decompressed(kind: bytes) -> None:
    """A thousand of them are a gigabyte."""
    pixels = zlib.compress(bytes(65 * 64))
    data = hostile.png(64, 64, *[compressed_text(kind)] * 1000, data=pixels)
    plain = hostile.png(64, 64, data=pixels)
    tracemalloc.start()
    taken = cpu_s(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(data) + 2**20
    assert taken < cpu_s(plain) + 0.15  # A second and more where they are.


def test_metadata_of_a_jpeg_reach_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    image = photo(64, 64)
    data = save(image, "JPEG", exif=exif, icc_profile=bytes(200_000), comment=b"c" * 60_000)
    plain = save(image, "JPEG")
    seen: list[int] = []
    opened = Image.open

    def spy(file: object, **options: object) -> Image.Image:
        seen.append(len(file.getvalue()))  # type: ignore[attr-defined]
        return opened(file, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", spy)
    cpu_s(data)
    assert set(seen) == {len(plain)}
