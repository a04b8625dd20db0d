"""Where each service's metrics listen: at --metrics-host, or else where the service does."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
import pytest

from tests.services import process
from tests.system import wait_for


@pytest.mark.process
@pytest.mark.parametrize("module", ["encoder_service", "llm_service"])
@pytest.mark.parametrize(
    ("flags", "host"),
    [
        (("--host", "127.0.0.3"), "127.0.0.3"),
        (("--host", "127.0.0.3", "--metrics-host", "127.0.0.2"), "127.0.0.2"),
    ],
)
def test_metrics_of_a_worker(module: str, flags: tuple[str, ...], host: str, tmp_path: Path):
    flags = (*flags, "--metrics-port", "0", "--store", f"shm://{tmp_path / 'tier'}")
    with process(module, *flags) as worker:
        told = re.compile(r"metrics at (http://(.+):\d+/metrics)")
        wait_for("the metrics' address", lambda: told.search("".join(worker._log)))
        found = told.search("".join(worker._log))
        assert found and found[2] == host
        answer = httpx2.get(found[1], trust_env=False)
        assert answer.status_code == 200 and "opticnerve_" in answer.text
