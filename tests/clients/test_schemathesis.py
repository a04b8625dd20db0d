"""schemathesis: requests of every route that /openapi.json describes, as it allows them and as it
does not; the answers must be those that it promises, and no fault of the server's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.server import KEY

pytest.importorskip("schemathesis")

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
def test_whole_api(server):
    program = Path(sys.executable).with_name("st")
    command = [
        program, "--config-file", HERE / "schemathesis.toml", "run", f"{server.url}/openapi.json",
        "--header", f"Authorization: Bearer {KEY}", "--no-color",
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
