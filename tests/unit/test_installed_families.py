"""Families that other distributions bring, by the entry-point group ``opticnerve.families``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opticnerve.cli import commands
from opticnerve.errors import FamilyError, UnsupportedCheckpoint
from opticnerve.models import registry

DECLARATION = """
from opticnerve.models.family import Family

FAMILY = Family(
    package=__name__,
    title="Acme-VL",
    model_types=({model_type!r},),
    layout=".layout:read",
    preprocess=".layout:read",
    tower=".vision:describe",
    decoder=".language:describe",
    vision_keys=(),
    language_keys=(),
)
"""
OTHER = {"model_type": "other", "vision_config": {}}

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(name, source)``: a distribution of one package with that ``__init__.py``, named in
    the group. Returns the package's folder."""
    monkeypatch.syspath_prepend(str(tmp_path))
    packages: list[str] = []

    def add(name: str, source: str, value: str = "") -> Path:
        packages.append(name)
        folder, record = tmp_path / name, tmp_path / f"{name}-1.2.dist-info"
        folder.mkdir()
        record.mkdir()
        (folder / "__init__.py").write_text(source)
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        points = f"[{registry.ENTRY_POINTS}]\n{name} = {value or name}\n"
        (record / "entry_points.txt").write_text(points)
        registry.discover.cache_clear()
        return folder

    yield add
    registry.discover.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@pytest.mark.parametrize("value", ["acme_vl", "acme_vl:FAMILY"])
def test_an_entry_point_names_a_package_or_a_declaration(install: Install, value: str) -> None:
    folder = install("acme_vl", DECLARATION.format(model_type="acme"), value)
    (folder / "layout.py").write_text("def read(checkpoint): return 'made'\n")
    family = registry.find_family({"model_type": "acme"})
    assert (family.name, family.title) == ("acme_vl", "Acme-VL")
    assert family.load_part(family.layout)(None) == "made"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import acme_needs_this", "ModuleNotFoundError: No module named 'acme_needs_this'"),
        ("1 / 0", "ZeroDivisionError"),
        ("FAMILY = 'acme'", "declares no FAMILY"),
    ],
)
def test_a_broken_family_is_named_and_the_others_are_served(
    install: Install, source: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(registry.families())
    install("acme_vl", source)
    assert set(registry.families()) == before
    assert commands.main(["check"]) == 0
    assert "note: the family acme_vl of acme_vl 1.2 cannot be used" in capsys.readouterr().out
    with pytest.raises(UnsupportedCheckpoint) as caught:
        registry.find_family(OTHER)
    assert "the family acme_vl of acme_vl 1.2 cannot be used" in caught.value.message
    assert said in caught.value.message


def test_only_a_checkpoint_that_two_families_claim_is_refused(install: Install) -> None:
    install("acme_vl", DECLARATION.format(model_type="acme"))
    install("ajax_vl", DECLARATION.format(model_type="acme"))
    with pytest.raises(FamilyError, match=r"acme_vl of acme_vl 1\.2, ajax_vl of"):
        registry.find_family({"model_type": "acme"})
    with pytest.raises(UnsupportedCheckpoint):
        registry.find_family(OTHER)


def test_families_of_one_name_conflict(install: Install) -> None:
    """Content keys hold the name: two families that share it would share keys."""
    name = next(iter(registry.families().values())).name
    install(name, DECLARATION.format(model_type="acme"))
    with pytest.raises(FamilyError, match=f"the name '{name}'"):
        registry.find_family({"model_type": "acme"})


def test_a_part_that_cannot_be_imported_is_a_typed_error(install: Install) -> None:
    install("acme_vl", DECLARATION.format(model_type="acme"))
    family = registry.find_family({"model_type": "acme"})
    with pytest.raises(FamilyError, match=r"\.layout:read of acme_vl cannot be imported"):
        registry._part(family, family.layout)
