"""Comparison of two commits of the product: worktrees, the code that processes import, and the CPU
time they use."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from bench import memory

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def trees(before: str | None) -> Iterator[dict[str, Path]]:
    """The tree of each side: ``before`` (that commit) and ``after``, or ``present`` alone."""
    with contextlib.ExitStack() as made:
        found = {"present": ROOT}
        if before:
            found = {"before": made.enter_context(checked_out(before)), "after": ROOT}
        for tree in found.values():
            check_imports(tree)
        yield found


@contextlib.contextmanager
def code_of(tree: Path) -> Iterator[None]:
    """While the context lasts, new processes import from ``tree``."""
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tree)
    try:
        with contextlib.chdir(tree):
            yield
    finally:
        os.environ.pop("PYTHONPATH")
        if former is not None:
            os.environ["PYTHONPATH"] = former


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A worktree of ``commit`` with its own stubs, while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="opticnerve-before-") as directory:
        tree = Path(directory) / "tree"
        git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            subprocess.run([sys.executable, "hatch_build.py"], cwd=tree, check=True)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))
            git("worktree", "prune")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"git {arguments[0]} failed, see above")
    return done.stdout.strip()


def check_imports(tree: Path) -> None:
    """Raises unless services that start under ``code_of(tree)`` run its code."""
    code = "import opticnerve, gateway; print(opticnerve.__file__); print(gateway.__file__)"
    with code_of(tree):
        found = subprocess.check_output([sys.executable, "-c", code], text=True)
    for line in found.split():
        if not Path(line).is_relative_to(tree.resolve()):
            raise SystemExit(f"{line} would run, not the code in {tree}")


def describe(before: str | None) -> dict[str, str | None]:
    """The commits that are compared, for a result's JSON."""
    return {
        "before": git("describe", "--always", before) if before else None,
        "present": git("describe", "--always", "--dirty") if (ROOT / ".git").exists() else None,
    }


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse ``type`` for names out of ``known``, separated by commas."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return read


def cpu_seconds(parent: int) -> dict[str, float]:
    """CPU time that each process of a stack has used."""
    tick = os.sysconf("SC_CLK_TCK")
    found = {}
    for name, pid in memory.children(parent).items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[name] = (int(fields[11]) + int(fields[12])) / tick
    return found
