"""`make test-images`: installs what each image installs, by the Dockerfile's own instructions but
for a CPU, into environments of their own, and runs deploy/compose.yaml's services from these."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from opticnerve.demo.chats import TURNS
from tests.compose import LocalStack
from tests.images import ROOT, build_script, copy_context

ENVIRONMENTS = {"gateway": ("gateway",), "worker": ("encoder", "llm")}  # Targets by their stage.
SERVICES = ("redis", "encoder-1", "encoder-2", "llm", "gateway")


def run(stage: str, root: Path, directory: Path) -> None:
    variables = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")} if stage == "wheel" else {}
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = build_script(stage, root)
    subprocess.run(["sh", "-c", script], cwd=directory, env=ours | variables, check=True)


def install(root: Path) -> dict[str, Path]:
    """The environment of each target."""
    source = root / "src"
    source.mkdir()
    copy_context(source)
    run("wheel", root, source)
    found = {}
    for name, targets in ENVIRONMENTS.items():
        below = root / name
        below.mkdir()
        (below / "wheels").symlink_to(root / "wheels")
        (below / "constraints.txt").write_bytes((ROOT / "constraints.txt").read_bytes())
        run(f"{name}-environment", below, below)
        environment = below / "opt" / "opticnerve"
        subprocess.run([environment / "bin" / "pip", "check"], check=True)
        found |= dict.fromkeys(targets, environment)
    return found


def size(environment: Path) -> int:
    """Bytes on disk."""
    files = (path for path in environment.rglob("*") if not path.is_symlink())
    return sum(path.stat().st_blocks * 512 for path in files)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        environments = install(Path(directory))
        assert not list(environments["gateway"].glob("lib/*/site-packages/torch")), "torch"
        stack = LocalStack(Path(directory) / "stack", environments)
        with stack.running(*SERVICES):
            assert stack.ask() == TURNS[0].answer
            assert all(stack.healthy(name) for name in SERVICES)
        for target, environment in environments.items():
            print(f"{target}: {size(environment) / 1e6:.0f} MB, serves")


if __name__ == "__main__":
    main()
