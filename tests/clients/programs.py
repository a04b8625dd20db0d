"""Clients that are programs of Node."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.clients.server import COLORS, KEY, MODEL, SEE, SEEN, SPELL, SPELT, STAR, Server

NODE = Path(__file__).parent / "node"
MODULES = NODE / "node_modules"


def needs_node(package: str) -> pytest.MarkDecorator:
    """A mark that skips tests where a package of npm is not installed."""
    reason = f"{package} is not installed in tests/clients/node: run make test-clients"
    return pytest.mark.skipif(not (MODULES / package).is_dir(), reason=reason)


def run_node(server: Server, script: str, *arguments: str) -> None:
    """Runs a script in ``node``, which fails the test with what it prints. The node that is used is
    npm's own package of it: clients need a newer one than most systems have."""
    asked = {
        "url": server.url, "key": KEY, "model": MODEL, "spell": SPELL, "spelt": SPELT,
        "see": SEE, "seen": SEEN, "star": STAR, "colors": COLORS,
    }  # fmt: skip
    ended = subprocess.run(
        [next(MODULES.glob("node-linux-*/bin/node"), "node"), script, *arguments],
        cwd=NODE,
        env={**os.environ, "ASKED": json.dumps(asked)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if ended.returncode:
        pytest.fail(ended.stdout + ended.stderr, pytrace=False)
