"""The table of every bound on clients in docs/security.md.

    python -m tests.policy_table

writes it anew from ``gateway.edge.limits``; a test holds the file to it.
"""

from __future__ import annotations

from pathlib import Path

from gateway.edge.limits import POLICY, Limit

DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
START, END = "<!-- bounds: python -m tests.policy_table -->\n", "<!-- end of bounds -->\n"
SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size(number: float) -> str:
    """A number of bytes: 512, 64 KiB, 20 MiB."""
    for unit, factor in SIZES:
        if number >= factor and number % factor == 0:
            return f"{number / factor:g} {unit}"
    return f"{number:g}"


def value(limit: Limit) -> str:
    if limit.what.startswith("bytes"):
        return size(limit.value)
    return f"{limit.value:,}" if isinstance(limit.value, int) else f"{limit.value:g}"


def row(limit: Limit) -> str:
    flag = f"`--{limit.flag.replace('_', '-')}`" if limit.flag else ""
    return f"| {limit.what} | {value(limit)} | {flag} | {limit.answer} |"


def table() -> str:
    lines = ["| what | bound | flag | a client that meets it |", "|---|---:|---|---|"]
    for heading, limits in POLICY.items():
        lines.append(f"| **{heading}** | | | |")
        lines.extend(map(row, limits))
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The document with the table between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + table() + "\n" + END + after


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
