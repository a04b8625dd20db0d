"""ARCHITECTURE.md names every module; a file that it does not know is a file nobody explained."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gateway", "encoder_service", "llm_service", "opticnerve")
TEXT = (ROOT / "ARCHITECTURE.md").read_text()


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            skipped = path.name.startswith("__") or "_pb2" in path.name
            if not skipped and "pb" not in path.parts:
                yield path.relative_to(ROOT)


@pytest.mark.parametrize("path", list(modules()), ids=str)
def test_every_module_is_named(path):
    assert f"`{path.name}`" in TEXT or f"`{path.parent.name}/{path.name}`" in TEXT
