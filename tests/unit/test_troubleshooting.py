"""docs/troubleshooting.md explains every code that an error can have."""

import re
from pathlib import Path

import pytest

from opticnerve.errors import by_name

ROOT = Path(__file__).parents[2]
PACKAGES = ("gateway", "encoder_service", "llm_service", "opticnerve")
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()


def codes() -> set[str]:
    """Codes of classes, and those that are given where an error is raised."""
    found = {cls.default_code for cls in by_name().values() if cls.default_code}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            found.update(re.findall(r'\bcode="(\w+)"', path.read_text()))
    return found | {"unknown_field"}


@pytest.mark.parametrize("code", sorted(codes()))
def test_every_code_is_explained(code: str) -> None:
    assert f"`{code}`" in TEXT


def test_no_code_is_explained_that_no_error_has() -> None:
    tables = TEXT[TEXT.index("## Codes of requests") : TEXT.index("## Answers look wrong")]
    rows = [line.split("|")[1] for line in tables.splitlines() if line.startswith("| `")]
    assert {code for row in rows for code in re.findall(r"`(\w+)`", row)} == codes()
