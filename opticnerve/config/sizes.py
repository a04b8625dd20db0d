"""Sizes in bytes as people write them: ``512M``, ``2GiB``."""

from __future__ import annotations

import re

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)(b?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "1048576", "512M", "2GiB" (1024s) or "2GB" (1000s). Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no size; write 512M or 2GiB")
    number, unit, binary, byte = match.groups()
    factor = UNITS[unit.upper()]
    if byte and not binary:
        factor = 1000 ** list(UNITS).index(unit.upper())
    return int(float(number) * factor)


def format_size(num_bytes: int) -> str:
    """``20MiB``: in the largest unit that divides the size, as ``parse_size`` reads it."""
    fits = [unit for unit, factor in UNITS.items() if num_bytes % factor == 0 < num_bytes]
    unit = fits[-1] if fits else ""
    return f"{num_bytes // UNITS[unit]}{unit + 'iB' if unit else ''}"
