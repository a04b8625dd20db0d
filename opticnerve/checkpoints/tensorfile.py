"""Where the tensors of a checkpoint lie in its files, from the files' headers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opticnerve.errors import CheckpointError
from opticnerve.tensors.header import LENGTH, header_end, parse_header

MAX_HEADER_BYTES = 100_000_000  # The format's own limit.


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor of a checkpoint lies. ``start`` and ``end`` are byte offsets in ``file``."""

    file: Path
    dtype: str  # Safetensors name: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of ``file`` by its key. Raises CheckpointError for one damaged or cut short."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            base = header_end(stream.read(LENGTH.size), MAX_HEADER_BYTES)
            if base > size:
                raise ValueError("it ends within its header")
            entries, _ = parse_header(stream.read(base - LENGTH.size), size - base)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged or was not downloaded whole: {error}; fetch it again"
        ) from error
    return {
        entry.name: TensorEntry(
            file, entry.dtype, entry.shape, base + entry.start, base + entry.end
        )
        for entry in entries
    }
