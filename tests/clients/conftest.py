"""One stack for the client programs, with API keys and few places: `make test-clients`.

The stack runs in the product's environment (SERVER_PYTHON) and the tests in one of the
clients' own, so that their requirements cannot clash. Nothing here imports the product's
dependencies.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.server import KEY, MODEL, PLACES, Server

READY = "OpticNerve is ready at "
ROOT = Path(__file__).parents[2]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for name in ("clients", "process", "slow"):
                item.add_marker(name)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A whole stack of the demo checkpoint, which ends with the session; or that at SERVER_URL,
    started with the same flags."""
    if url := os.environ.get("SERVER_URL"):
        yield Server(url)
        return
    keys = tmp_path_factory.mktemp("stack") / "keys"
    keys.write_text(f"clients: {KEY}\n")
    command = [
        os.environ.get("SERVER_PYTHON", sys.executable), "-m", "opticnerve", "up",
        "--port", "0", "--host", "127.0.0.1", "--dtype", "float32", "--api-key-file", str(keys),
        "--max-model-len", "2048",  # An answer of any length ends within a client's timeout.
        "--max-concurrent-requests", str(PLACES), "--parent-pid", str(os.getpid()),
    ]  # fmt: skip
    log = keys.with_name("log")
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True) as up,
    ):
        try:
            assert up.stdout
            line = next((line for line in up.stdout if line.startswith(READY)), None)
            assert line, log.read_text()
            yield Server(line.removeprefix(READY).strip())
        finally:
            up.terminate()


@pytest.fixture
def busy(server: Server) -> Iterator[None]:
    """Every place of the gateway is taken, so that it answers 429."""
    body = json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "ignore_eos": True,
        }
    )
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    address = server.url.removeprefix("http://")
    connections = [http.client.HTTPConnection(address, timeout=60) for _ in range(PLACES)]
    answers = []
    try:
        for connection in connections:
            connection.request("POST", "/v1/chat/completions", body, headers)
            answers.append(connection.getresponse())
            assert answers[-1].status == 200
        yield
    finally:
        for each in (*answers, *connections):
            each.close()
        server.wait_idle()
