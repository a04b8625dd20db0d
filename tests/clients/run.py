"""`make test-clients`: installs the client programs, runs their tests and writes their table.

    python -m tests.clients.run [ENVIRONMENT...]

Each environment is a virtual environment of its own in .venv-clients/, because clients want
different versions of the same packages; that of Node is tests/clients/node. The server runs in this
program's. A client that cannot be installed is named, and its tests are not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.clients.table import (
    CLIENTS,
    DOCUMENT,
    ENVIRONMENTS,
    NODE,
    NODE_MODULES,
    ROOT,
    report,
    with_table,
)

ALL = tuple(dict.fromkeys(client.environment for client in CLIENTS))


def install(environment: str) -> Path | None:
    """Its Python, with the clients installed; None where they cannot be."""
    if environment == NODE:
        npm = shutil.which("npm")
        command = [npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"]
        return Path(sys.executable) if npm and _runs(*command, cwd=NODE_MODULES.parent) else None
    folder = ENVIRONMENTS / environment
    python = folder / "bin" / "python"
    requirements = Path(__file__).parent / "requirements" / f"{environment}.txt"
    made = python.exists() or _runs(sys.executable, "-m", "venv", folder)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-r", requirements]
    return python if made and _runs(*pip) else None


def _runs(*command: str | Path, cwd: Path = ROOT) -> bool:
    return subprocess.run(command, cwd=cwd).returncode == 0


def test(environment: str, python: Path) -> bool:
    """Runs the tests of an environment's clients; whether all pass."""
    files = [client.tests for client in CLIENTS if client.environment == environment]
    command = [
        python, "-m", "pytest", *filter(Path.exists, files), f"--junit-xml={report(environment)}",
    ]  # fmt: skip
    variables = {"SERVER_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode == 0


def main(*environments: str) -> int:
    ENVIRONMENTS.mkdir(exist_ok=True)
    left_out, failed = [], []
    for environment in environments or ALL:
        report(environment).unlink(missing_ok=True)
        python = install(environment)
        if python is None:
            left_out.append(environment)
        elif not test(environment, python):
            failed.append(environment)
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
    for environment in left_out:
        names = [client.name for client in CLIENTS if client.environment == environment]
        print(f"Not installed, so not run: {', '.join(names)} ({environment})")
    print(f"Failed in: {', '.join(failed)}" if failed else "All that ran passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
