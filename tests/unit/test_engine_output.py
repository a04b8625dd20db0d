"""Where a build writes: what it replaces, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from encoder_service.backends.base import Bucket
from encoder_service.engines import output
from encoder_service.engines.output import replacing
from encoder_service.engines.sidecar import FORMAT, GRAPH_FILE, PROBES_FILE, Sidecar, describe_files
from opticnerve.config.encoder import SIDECAR
from opticnerve.errors import ConfigError, UnusableEngine


def fill(directory: Path, text: str) -> None:
    """Makes an engine of it."""
    for name in (GRAPH_FILE, PROBES_FILE):
        (directory / name).write_text(text)
    Sidecar(
        model=None, revision=None, family="f", fingerprint="f", backend="onnx", precision="float32",
        buckets=(Bucket(64, 1),), library="onnxruntime", library_version="1",
        compute_capabilities=(), made_by="a release", probes=(), format=FORMAT,
        files=describe_files(directory), parity=None,
    ).write(directory)  # fmt: skip


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    directory = tmp_path / "engines" / "mine"
    directory.mkdir(parents=True)
    fill(directory, "old")
    return directory


def graph_in(directory: Path) -> str:
    return (directory / GRAPH_FILE).read_text()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_engine_is_replaced_and_nothing_is_left_beside_it(engine: Path) -> None:
    with replacing(engine) as made:
        fill(made, "new")
        assert graph_in(engine) == "old"
    assert graph_in(engine) == "new"
    assert names(engine.parent) == ["mine"]


def test_a_damaged_engine_is_replaced(engine: Path) -> None:
    (engine / GRAPH_FILE).unlink()
    with replacing(engine) as made:
        fill(made, "new")
    assert graph_in(engine) == "new"


def test_a_new_and_an_empty_directory_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        with replacing(tmp_path / name) as made:
            fill(made, name)
        assert graph_in(tmp_path / name) == name


def add_file(engine: Path) -> None:
    (engine / "thesis.txt").write_text("x")


def add_folder(engine: Path) -> None:
    (engine / "src").mkdir()


def link_the_graph(engine: Path) -> None:
    (engine / GRAPH_FILE).rename(engine.parent / "graph")
    (engine / GRAPH_FILE).symlink_to(engine.parent / "graph")


def write_another_sidecar(engine: Path) -> None:
    (engine / SIDECAR).write_text("{}")


@pytest.mark.parametrize("change", [add_file, add_folder, link_the_graph, write_another_sidecar])
def test_what_is_not_an_engine_alone_is_left_as_it_is(
    engine: Path, change: Callable[[Path], None]
) -> None:
    change(engine)
    before = names(engine)
    with pytest.raises(ConfigError, match="with -o"), replacing(engine):
        pytest.fail("nothing should be built")
    assert names(engine) == before


def test_what_was_put_there_during_the_build_is_left(engine: Path) -> None:
    said = r"more than an engine: thesis\.txt"
    with pytest.raises(ConfigError, match=said), replacing(engine) as made:
        fill(made, "new")
        add_file(engine)
    assert graph_in(engine) == "old" and names(engine.parent) == ["mine"]


def test_the_working_directory_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine)
    for directory in (Path("."), engine, Path("..")):
        with pytest.raises(ConfigError, match="the working directory"), replacing(directory):
            pytest.fail("nothing should be built")
    assert graph_in(engine) == "old"


def test_a_link_leads_to_the_new_engine(engine: Path) -> None:
    link = engine.parent / "link"
    link.symlink_to(engine)
    with replacing(link) as made:
        fill(made, "new")
    assert link.is_symlink() and graph_in(link) == graph_in(engine) == "new"


@pytest.mark.parametrize("kind", ["file", "loop"])
def test_what_is_no_directory_is_refused_before_the_build(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    place.write_text("x") if kind == "file" else place.symlink_to(place)
    with pytest.raises(ConfigError, match="cannot use"), replacing(place):
        pytest.fail("nothing should be built")


def test_the_old_engine_stays_if_the_new_one_cannot_be_moved(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if graph_in(path) == "new":
            raise OSError("no space")
        return rename(path, target)

    monkeypatch.setattr(output.Path, "rename", refuse)
    with pytest.raises(UnusableEngine, match="no space"), replacing(engine) as made:
        fill(made, "new")
    assert graph_in(engine) == "old" and names(engine.parent) == ["mine"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replacing(tmp_path / "new"):
        raise KeyError
    assert not names(tmp_path)
