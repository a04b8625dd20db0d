"""Bounds-checked reading of numbers from bytes, for all parsers of formats."""

from __future__ import annotations

from collections.abc import Iterable

from opticnerve.errors import InvalidMedia

MAX_PIECES = 100_000
"""Most chunks, segments or blocks read of one file. Ordinary files have thousands; millions of
empty ones would keep a core busy for seconds."""

PIECE_PASSES = 2048
"""Decode cost of one piece, in pixel-passes."""

SMALL_PIXELS = 2**18
"""``check_room`` skips pictures of up to this many pixels."""


class Window:
    """Read-only bytes. Reading past the end raises InvalidMedia: the file was cut short."""

    __slots__ = ("data", "what")

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self.data = memoryview(data).cast("B")
        self.what = what  # The format's name in messages: "PNG", "JPEG", ...

    def __len__(self) -> int:
        return len(self.data)

    def take(self, at: int, size: int) -> bytes:
        if at < 0 or at + size > len(self.data):
            raise self.truncated()
        return bytes(self.data[at : at + size])

    def u8(self, at: int) -> int:
        return self.take(at, 1)[0]

    def be16(self, at: int) -> int:
        return int.from_bytes(self.take(at, 2), "big")

    def be32(self, at: int) -> int:
        return int.from_bytes(self.take(at, 4), "big")

    def le16(self, at: int) -> int:
        return int.from_bytes(self.take(at, 2), "little")

    def le24(self, at: int) -> int:
        return int.from_bytes(self.take(at, 3), "little")

    def le32(self, at: int) -> int:
        return int.from_bytes(self.take(at, 4), "little")

    def without(self, ranges: Iterable[tuple[int, int]]) -> memoryview | bytes:
        """The bytes outside of ``ranges``: [start, end) each, ascending, not overlapping."""
        parts, at = [], 0
        for start, end in ranges:
            parts.append(self.data[at:start])
            at = end
        return b"".join([*parts, self.data[at:]]) if parts else self.data

    def truncated(self) -> InvalidMedia:
        return InvalidMedia(f"the {self.what} picture is cut short; send all of its bytes")

    def damaged(self, how: str) -> InvalidMedia:
        return InvalidMedia(f"the {self.what} picture is damaged: {how}; save it again")

    def check_room(self, pixels: int, capacity: int) -> None:
        """Raises InvalidMedia if the header gives more ``pixels`` than the data can hold
        (``capacity``): decoding would fill gigabytes with nothing."""
        if capacity < pixels and pixels > SMALL_PIXELS:
            raise InvalidMedia(
                f"the {self.what} picture is cut short: its data cannot hold the pixels that its "
                "header says; send all of its bytes",
                code="truncated_image",
            )

    def count(self, pieces: int) -> None:
        """Raises InvalidMedia for more ``pieces`` than any ordinary file has."""
        if pieces > MAX_PIECES:
            raise self.damaged("it is cut into too many pieces")
