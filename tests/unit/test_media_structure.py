"""Structure from headers alone, held against Pillow on the same bytes."""

from __future__ import annotations

import io
import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator

import pytest
from PIL import Image, ImageOps

from opticnerve.errors import InvalidMedia
from opticnerve.media.plan import Structure
from opticnerve.media.probe import parse_structure

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
WITH_EXIF = ("PNG", "JPEG", "WEBP")
ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _quiet_pillow() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata.
        yield


def encode(
    format: str, size: tuple[int, int] = (37, 21), orientation: int | None = None, **options: object
) -> bytes:
    image = Image.new("RGB", size, (200, 10, 30))
    if orientation is not None:
        exif = Image.Exif()
        exif[0x010E] = "a description that lies outside its entry"
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def insert_png_chunk(png: bytes, before: bytes, *chunks: bytes) -> bytes:
    at = png.index(before) - 4
    return png[:at] + b"".join(chunks) + png[at:]


def tiff(orientation: int, order: str = ">") -> bytes:
    head = (b"MM\x00\x2a" if order == ">" else b"II\x2a\x00") + struct.pack(order + "L", 8)
    entry = struct.pack(order + "HHLHH", ORIENTATION, 3, 1, orientation, 0)
    return head + struct.pack(order + "H", 1) + entry + struct.pack(order + "L", 0)


def pillow(data: bytes) -> tuple[str, tuple[int, int], tuple[int, int], bool] | None:
    """(format, stored size, displayed size, animated), or None where Pillow gives up."""
    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            animated = getattr(image, "n_frames", 1) > 1
            name = "JPEG" if image.format == "MPO" else str(image.format)
            return name, image.size, ImageOps.exif_transpose(image).size, animated
    except Exception:
        return None


def ours(data: bytes) -> tuple[str, tuple[int, int], tuple[int, int], bool]:
    found = parse_structure(data, 10**12, 10**15, allow_animation=True)
    size = (found.width, found.height)
    return found.format.upper(), size, found.displayed_size, found.frames > 1


def upright(data: bytes, orientation: int) -> bool:
    """Whether Pillow turns these bytes as ``orientation`` says."""
    plain = Image.open(io.BytesIO(data))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    expected = plain if method is None else plain.transpose(method)
    return expected.tobytes() == turned.tobytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (37, 21), (640, 3)])
def test_size_and_format(format: str, size: tuple[int, int]) -> None:
    found = parse_structure(encode(format, size))
    assert found == Structure(format.lower(), *size)


@pytest.mark.parametrize("format", WITH_EXIF)
@pytest.mark.parametrize("orientation", range(11))
def test_orientation_is_that_of_pillow(format: str, orientation: int) -> None:
    image = Image.frombytes("RGB", (5, 3), random.Random(orientation).randbytes(45))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    image.save(buffer, format, exif=exif, **options)
    found = parse_structure(buffer.getvalue())
    assert found.orientation == (orientation if 1 <= orientation <= 8 else 1)
    assert upright(buffer.getvalue(), found.orientation)


@pytest.mark.parametrize("order", ["<", ">"])
def test_png_exif_after_the_data(order: str) -> None:
    data = insert_png_chunk(encode("PNG"), b"IEND", chunk(b"eXIf", tiff(6, order)))
    assert parse_structure(data).orientation == 6
    assert ours(data) == pillow(data)


def test_the_last_png_exif_counts() -> None:
    data = insert_png_chunk(encode("PNG"), b"IDAT", chunk(b"eXIf", tiff(3)))
    data = insert_png_chunk(data, b"IEND", chunk(b"eXIf", tiff(8)))
    assert parse_structure(data).orientation == 8
    assert ours(data) == pillow(data)


def png_text_chunks() -> dict[str, bytes]:
    profile = b"\nexif\n      34\n" + (b"Exif\x00\x00" + tiff(6)).hex().encode()
    xmp = b'<x tiff:Orientation="6"/>'
    raw, adobe = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"
    return {
        "raw profile, tEXt": chunk(b"tEXt", raw + profile),
        "raw profile, zTXt": chunk(b"zTXt", raw + b"\0" + zlib.compress(profile)),
        "xmp, iTXt": chunk(b"iTXt", adobe + b"\0\0\0\0" + xmp),
        "xmp, iTXt compressed": chunk(b"iTXt", adobe + b"\1\0\0\0" + zlib.compress(xmp)),
        "xmp, tEXt": chunk(b"tEXt", adobe + b"<tiff:Orientation>6</tiff:Orientation>"),
    }


@pytest.mark.parametrize("name", png_text_chunks())
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_png_orientation_in_texts(name: str, before: bytes) -> None:
    data = insert_png_chunk(encode("PNG"), before, png_text_chunks()[name])
    assert parse_structure(data).orientation == 6
    assert ours(data) == pillow(data)


def test_xmp_counts_only_without_exif_orientation() -> None:
    xmp = png_text_chunks()["xmp, iTXt"]
    data = insert_png_chunk(encode("PNG"), b"IDAT", chunk(b"eXIf", tiff(1)), xmp)
    assert parse_structure(data).orientation == 1
    assert ours(data) == pillow(data)


def test_jpeg_xmp_orientation() -> None:
    jpeg = encode("JPEG")
    content = b'http://ns.adobe.com/xap/1.0/\x00<x tiff:Orientation="8"/>'
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]
    assert parse_structure(data).orientation == 8
    assert ours(data) == pillow(data)


def test_jpeg_exif_split_over_segments() -> None:
    jpeg, block = encode("JPEG"), tiff(6)
    data = jpeg[:2]
    for part in (block[:15], block[15:]):
        content = b"Exif\x00\x00" + part
        data += b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
    data += jpeg[2:]
    assert parse_structure(data).orientation == 6
    assert ours(data) == pillow(data)


def test_jpeg_thumbnails_and_fill_bytes() -> None:
    jpeg, thumbnail = encode("JPEG", (64, 48)), encode("JPEG", (8, 6), orientation=6)
    content = b"JFXX\x00\x10" + thumbnail
    segment = b"\xff\xff\xff\xe0" + struct.pack(">H", len(content) + 2) + content
    data = jpeg[:2] + segment + jpeg[2:]
    assert parse_structure(data) == Structure("jpeg", 64, 48)
    assert ours(data) == pillow(data)


@pytest.mark.parametrize("kind", range(18))
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_exif_entry_types(kind: int, count: int) -> None:
    """Orientation written as any type that TIFF knows, and some that it does not."""
    value = {5: ">LL", 10: ">ll", 11: ">f", 12: ">d", 16: ">Q", 3: ">H", 8: ">h"}.get(kind, ">L")
    number = struct.pack(value, 6, 1) if value in (">LL", ">ll") else struct.pack(value, 6)
    number = {1: b"\6", 2: b"6", 6: b"\6", 7: b"\6"}.get(kind, number) * max(count, 1)
    inline = len(number) <= 4
    field = number.ljust(4, b"\0") if inline else struct.pack(">L", 26)
    entry = struct.pack(">HHL", ORIENTATION, kind, count) + field
    block = b"MM\x00\x2a\0\0\0\x08" + struct.pack(">H", 1) + entry + bytes(4)
    data = insert_png_chunk(encode("PNG"), b"IDAT", chunk(b"eXIf", block + number))
    expected = pillow(data)
    if expected is not None:  # Of some, Pillow fails the picture; then any answer will do.
        assert ours(data) == expected
    else:
        parse_structure(data)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP"])
def test_animation_is_refused_and_says_what_to_send(format: str) -> None:
    frames = [Image.new("RGB", (9, 7), (shade, 0, 0)) for shade in (0, 100, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], duration=50)
    with pytest.raises(InvalidMedia, match=r"animated.*still frame") as caught:
        parse_structure(buffer.getvalue())
    assert caught.value.code == "animated_image"
    found = parse_structure(buffer.getvalue(), allow_animation=True)
    assert (found.width, found.height) == (9, 7)
    assert found.frames > 1


def test_a_gif_of_one_frame_is_a_picture() -> None:
    assert parse_structure(encode("GIF")).frames == 1


def test_a_gif_whose_image_leaves_its_screen() -> None:
    data = bytearray(encode("GIF", (20, 10)))
    data[6:10] = struct.pack("<HH", 4, 30)
    assert ours(bytes(data))[1] == (20, 30)


def test_a_bmp_from_the_top() -> None:
    data = bytearray(encode("BMP", (6, 5)))
    data[22:26] = struct.pack("<i", -5)
    assert ours(bytes(data)) == pillow(bytes(data))


def test_a_multi_picture_jpeg_is_its_first_picture() -> None:
    buffer = io.BytesIO()
    first, second = Image.new("RGB", (30, 20)), Image.new("RGB", (15, 10))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert parse_structure(buffer.getvalue()) == Structure("jpeg", 30, 20)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_anywhere_is_refused_or_right(format: str) -> None:
    whole = encode(format, (13, 11), orientation=6 if format in WITH_EXIF else None)
    for end in range(len(whole)):
        data = whole[:end]
        expected = pillow(data)
        try:
            found = ours(data)
        except InvalidMedia:
            assert expected is None, f"cut at {end}"
            continue
        assert expected in (None, found), f"cut at {end}"


def mutations(count: int) -> Iterator[bytes]:
    """Damaged copies of good files: bytes, cuts and insertions, more of them near the head."""
    rng = random.Random(20_241)
    seeds = [encode(format, (rng.randint(1, 40), rng.randint(1, 40))) for format in FORMATS]
    seeds += [encode(format, (31, 17), turn) for format in WITH_EXIF for turn in (1, 3, 6)]
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        action = rng.random()
        if action < 0.2:
            del data[rng.randrange(len(data)) :]
        elif action < 0.9:
            for _ in range(rng.randint(1, 3)):
                at = min(int(rng.expovariate(1 / 60)), len(data) - 1)
                data[at] = rng.choice([0, 1, 255, rng.randrange(256), data[at] ^ 1])
        else:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        yield bytes(data)


@pytest.mark.slow
def test_damaged_files_are_read_as_pillow_reads_them() -> None:
    agreed = 0
    for data in mutations(4_000):
        expected = pillow(data)
        try:
            found = ours(data)
        except InvalidMedia as error:
            lies = error.code == "truncated_image"  # Pillow notices when it decodes.
            assert expected is None or lies, (error.message, expected)
            continue
        if expected is not None:
            assert found == expected
            agreed += 1
    assert agreed > 500  # The mutations leave many files readable: the test compares something.


def test_random_bytes_raise_nothing_else() -> None:
    rng = random.Random(7)
    heads = [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF\xff\0\0\0WEBPVP8X",
        b"GIF89a",
        b"BM",
    ]
    for _ in range(3_000):
        data = rng.choice(heads) + rng.randbytes(rng.randrange(200))
        try:
            parse_structure(data, allow_animation=True)
        except InvalidMedia:
            continue


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"hello, this is text", "no known picture format"),
        (b"II\x2a\x00" + bytes(40), "TIFF"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(40), "AVIF"),
        (b"\x00\x00\x00\x1cftypheic" + bytes(40), "HEIC"),
        (b"\x00\x00\x00\x1cftypisom" + bytes(40), "MP4"),
        (b"  <svg xmlns=...", "SVG"),
        (b"<!DOCTYPE HTML><html>", "web page"),
        (b"%PDF-1.7", "PDF"),
        (b"RIFF\x00\x00\x00\x00WAVE", "RIFF"),
    ],
)
def test_other_formats_are_named_with_what_is_supported(data: bytes, said: str) -> None:
    with pytest.raises(InvalidMedia, match=said) as caught:
        parse_structure(data)
    assert "PNG, JPEG, WebP, GIF and BMP" in caught.value.message


def test_a_bomb_is_told_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", bytes(1_200_000))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
    with pytest.raises(InvalidMedia, match="20000x20000") as caught:
        parse_structure(data)
    assert caught.value.code == "image_too_large"
    assert parse_structure(data, 400_000_000, 2**32).width == 20_000


def test_no_pixels() -> None:
    data = bytearray(encode("BMP"))
    data[18:22] = bytes(4)
    with pytest.raises(InvalidMedia, match="no pixels"):
        parse_structure(bytes(data))


def test_messages_quote_no_bytes() -> None:
    for data in (b"secret-token-1234567890", b"\x89PNG\r\n\x1a\nsecret-token-1234567890" * 3):
        with pytest.raises(InvalidMedia) as caught:
            parse_structure(data)
        assert "secret" not in caught.value.message


def test_a_file_of_countless_pieces_is_refused() -> None:
    png = insert_png_chunk(encode("PNG"), b"IEND", chunk(b"aaAa", b"") * 150_000)
    gif = encode("GIF")[:13] + b"\x21\xfe" + b"\x01a" * 200_000
    for data in (png, gif):
        with pytest.raises(InvalidMedia, match="pieces"):
            parse_structure(data)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "fill bytes": lambda: b"\xff\xd8" + b"\xff" * 20_000_000,
    "escaped bytes": lambda: b"\xff\xd8\xff" + b"\x00\xff" * 10_000_000,
    "restarts": lambda: b"\xff\xd8" + b"\xff\xd0" * 10_000_000,
    "empty segments": lambda: b"\xff\xd8" + b"\xff\xe0\x00\x02" * 5_000_000,
    "no markers": lambda: b"\xff\xd8\xff\xe0\x00\x02" + bytes(20_000_000),
    "gif rubbish": lambda: b"GIF89a" + bytes(20_000_000),
    "gif blocks": lambda: b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\x01" * 20_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_linear_time(name: str) -> None:
    data = HOSTILE[name]()
    started = time.process_time()
    with pytest.raises(InvalidMedia):
        parse_structure(data)
    assert time.process_time() - started < 5  # Milliseconds; minutes when quadratic.


def test_memoryviews_are_taken() -> None:
    assert parse_structure(memoryview(encode("JPEG"))).format == "jpeg"
