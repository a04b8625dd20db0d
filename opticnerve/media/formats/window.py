"""Bounds-checked reading of numbers from bytes: what every parser here stands on."""

from __future__ import annotations

from opticnerve.errors import InvalidMedia

MAX_PIECES = 100_000
"""Chunks, segments or blocks walked in one file. Honest files have thousands; a file of millions
of empty ones would keep a core busy for seconds."""

PIECE_PASSES = 2048
"""What walking one piece costs, in pixels decoded once."""

SMALL_PIXELS = 2**18
"""Pictures so small are not worth a look at whether their data can hold them."""


class Window:
    """Read-only bytes. Reading past the end is InvalidMedia: the file was cut short."""

    __slots__ = ("data", "what")

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self.data = memoryview(data).cast("B")
        self.what = what  # Of messages: "PNG", "JPEG", ...

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

    def truncated(self) -> InvalidMedia:
        return InvalidMedia(f"the {self.what} picture is cut short; send all of its bytes")

    def damaged(self, how: str) -> InvalidMedia:
        return InvalidMedia(f"the {self.what} picture is damaged: {how}; save it again")

    def check_room(self, pixels: int, most: int) -> None:
        """Raises InvalidMedia where the data hold ``most`` pixels at the very most, and the header
        says ``pixels``: decoding would fill gigabytes with nothing."""
        if most < pixels and pixels > SMALL_PIXELS:
            raise InvalidMedia(
                f"the {self.what} picture is cut short: its data cannot hold the pixels that its "
                "header says; send all of its bytes",
                code="truncated_image",
            )

    def count(self, pieces: int) -> None:
        """Raises InvalidMedia once ``pieces`` is more than any honest file has."""
        if pieces > MAX_PIECES:
            raise self.damaged("it is cut into too many pieces")
