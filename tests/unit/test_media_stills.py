"""What looks like an animation and is none: PNG, WebP and GIF whose headers promise too much."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest

from opticnerve.errors import InvalidMedia
from opticnerve.media.decode import decode
from opticnerve.media.plan import Grid, Modality, Plan
from opticnerve.media.probe import parse_structure
from tests.unit.test_media_structure import chunk, encode, pillow


def apng(*parts: bytes) -> bytes:
    """A PNG of these chunks, with "IDAT" as the picture's own data."""
    png = encode("PNG", (9, 7))
    at, end = png.index(b"IDAT") - 4, png.index(b"IEND") - 4
    data = {b"IDAT": png[at:end]}
    return png[:at] + b"".join(data.get(part, part) for part in parts) + png[end:]


def actl(frames: int) -> bytes:
    return chunk(b"acTL", struct.pack(">II", frames, 0))


def fctl(number: int, width: int = 9) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, 7, 0, 0, 1, 10, 0, 0))


def fdat(number: int) -> bytes:
    return chunk(b"fdAT", struct.pack(">I", number) + zlib.compress(bytes(7 * 28)))


IDAT = b"IDAT"
STILL_PNGS: dict[str, Callable[[], bytes]] = {
    "no frames": lambda: apng(actl(0), IDAT),
    "more frames than a number holds": lambda: apng(actl(2**32 - 1), fctl(0), IDAT),
    "2³¹ - 1 frames, and one": lambda: apng(actl(2**31 - 1), fctl(0), IDAT),
    "a thousand frames, and none": lambda: apng(actl(1000), IDAT),
    "controls without data": lambda: apng(actl(3), fctl(0), IDAT, fctl(1), fctl(2)),
    "data without controls": lambda: apng(actl(3), IDAT, fdat(0), fdat(1)),
    "announced after the data": lambda: apng(IDAT, actl(2), fctl(0), fdat(1), fctl(2), fdat(3)),
    "announced twice": lambda: apng(actl(2), actl(2), fctl(0), IDAT, fctl(1), fdat(2)),
    "not announced": lambda: apng(fctl(0), IDAT, fctl(1), fdat(2)),
    "one frame": lambda: apng(actl(1), fctl(0), IDAT),
    "announced in half": lambda: apng(chunk(b"acTL", b"\0\0\0\2"), fctl(0), IDAT),
    "a frame larger than the picture": lambda: apng(actl(5), fctl(0, 400), IDAT),
    "half a control": lambda: apng(actl(5), chunk(b"fcTL", b"ab"), IDAT, fctl(0), fdat(1)),
    "a number left out": lambda: apng(actl(5), fctl(7), IDAT),
    "a wrong checksum": lambda: apng(actl(2)[:-1] + b"?", IDAT),
    "frames before the picture": lambda: apng(actl(2), fctl(0), fdat(1), fctl(2), fdat(3), IDAT),
}


def webp(flags: int, *parts: tuple[bytes, bytes]) -> bytes:
    size = struct.pack("<I", 8)[:3] + struct.pack("<I", 6)[:3]
    parts = ((b"VP8X", struct.pack("<I", flags) + size), *parts)
    body = b"WEBP" + b"".join(riff(*part) for part in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def riff(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) & 1)


def image() -> tuple[bytes, bytes]:
    data = encode("WEBP", (9, 7), lossless=True)
    return b"VP8L", data[20 : 20 + struct.unpack_from("<I", data, 16)[0]]


def anmf(empty: bool = False) -> tuple[bytes, bytes]:
    head = struct.pack("<QQ", 8 << 48, 6 << 8 | 100 << 32)
    return b"ANMF", head + (b"" if empty else riff(*image()))


ANIM = (b"ANIM", bytes(6))
STILL_WEBPS: dict[str, Callable[[], bytes]] = {
    "a flag": lambda: webp(2, image()),
    "a flag and a header": lambda: webp(2, ANIM, image()),
    "frames without data": lambda: webp(2, ANIM, image(), anmf(True), anmf(True)),
    "frames without the flag": lambda: webp(0, image(), anmf(), anmf()),
    "one frame": lambda: webp(2, ANIM, anmf()),
    "one frame and one without data": lambda: webp(2, ANIM, anmf(), anmf(True)),
}


def gif(*more: bytes) -> bytes:
    return encode("GIF", (9, 7))[:-1] + b"".join(more) + b";"


CONTROL = b"\x21\xf9\x04\0\x0a\0\0\0"
LOOP = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
DESCRIPTOR = struct.pack("<BHHHHB", 0x2C, 0, 0, 9, 7, 0)
STILL_GIFS: dict[str, Callable[[], bytes]] = {
    "a loop of one": lambda: gif(LOOP),
    "control of nothing": lambda: gif(LOOP, CONTROL),
    "a frame cut off": lambda: gif(CONTROL, DESCRIPTOR)[:-1],
    "a frame without data": lambda: gif(CONTROL, DESCRIPTOR, b"\2\0"),
    "a frame of no size": lambda: gif(b"\x2c" + bytes(9), b"\2\2\x44\1\0"),
}
STILLS = STILL_PNGS | STILL_WEBPS | STILL_GIFS


@pytest.mark.parametrize("make", STILLS.values(), ids=STILLS)
def test_what_only_says_that_it_moves_is_a_still_picture(make: Callable[[], bytes]) -> None:
    """Decoders fail at some of them as they are."""
    data = make()
    found = parse_structure(data)
    assert (found.width, found.height, found.frames) == (9, 7, 1)
    plan = Plan(Modality.IMAGE, found.format, 9, 7, 1, 28, 28, Grid(1, 2, 2), 1, 4)
    assert decode(data, plan).tobytes() == bytes((200, 10, 30)) * 63


@pytest.mark.parametrize(
    "make",
    [
        lambda: apng(actl(2), fctl(0), IDAT, fctl(1), fdat(2)),
        lambda: apng(actl(2), IDAT, fctl(0), fdat(1), fctl(2), fdat(3)),
        lambda: webp(2, ANIM, anmf(), anmf()),
        lambda: gif(CONTROL, DESCRIPTOR, b"\2\2\x44\1\0"),
    ],
)
def test_what_moves_is_animated(make: Callable[[], bytes]) -> None:
    assert pillow(make())[3]
    assert parse_structure(make(), allow_animation=True).frames > 1
    with pytest.raises(InvalidMedia, match="animated"):
        parse_structure(make())


@pytest.mark.parametrize("flags", [0, 2])
def test_a_webp_without_a_picture(flags: int) -> None:
    for data in (webp(flags), webp(flags, ANIM, anmf(True)), webp(0, ANIM, anmf())):
        with pytest.raises(InvalidMedia, match="no image data"):
            parse_structure(data)
