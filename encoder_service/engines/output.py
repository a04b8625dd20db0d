"""The directory that a build writes: made beside its place, and moved there at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from encoder_service.engines.sidecar import Sidecar
from opticnerve.config.encoder import SIDECAR
from opticnerve.errors import ConfigError, UnusableEngine


@contextlib.contextmanager
def replacing(wanted: Path) -> Iterator[Path]:
    """An empty directory that takes the place of ``wanted`` at the end, or is deleted on failure.

    A directory that holds an engine and nothing else is replaced, and deleted last. If ``wanted``
    is a symbolic link, it goes on pointing to its directory. Raises ConfigError for what cannot be
    replaced, before anything is built; UnusableEngine if the directory cannot be put in place.
    """
    place = Path(os.path.realpath(wanted))
    _check(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    except OSError as error:
        raise ConfigError(f"cannot write to {place.parent}: {error}", param="output") from error
    try:
        yield made
        os.chmod(made, 0o755)
        _check(place)  # Again: a build takes minutes.
        _put(made, place)
    except OSError as error:
        raise UnusableEngine(f"the engine cannot be written: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check(place: Path) -> None:
    """Raises ConfigError unless ``place`` is free, empty or an engine, and not in use."""
    if not os.path.lexists(place):
        return
    try:
        if Path.cwd().is_relative_to(place):
            raise ConfigError(
                f"{place} is the working directory, or holds it; give another one with -o",
                param="output",
            )
        found = {each.name for each in place.iterdir()}
        files = {each.name for each in place.iterdir() if each.is_file() and not each.is_symlink()}
    except OSError as error:
        raise ConfigError(f"cannot use {place}: {error}", param="output") from error
    if not found:
        return
    try:
        engine = {SIDECAR, *Sidecar.read(place).files}
    except UnusableEngine as error:
        raise ConfigError(
            f"{place} exists and holds no engine that can be read; remove it, or give another one "
            "with -o",
            param="output",
        ) from error
    if foreign := sorted((found - engine) | (found - files)):
        raise ConfigError(
            f"{place} holds more than an engine: {', '.join(foreign[:5])}; give another one "
            "with -o",
            param="output",
        )


def _put(made: Path, place: Path) -> None:
    """Moves ``made`` to ``place``. Raises OSError, and then ``place`` is as it was."""
    if not place.exists():
        made.rename(place)
        return
    aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        place.rename(aside)
        try:
            made.rename(place)
        except OSError:
            aside.rename(place)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
