"""SIGHUP ends no worker: it has nothing to read again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from opticnerve.client import EncoderClient, LLMClient
from tests.services import process


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "client"), [("encoder_service", EncoderClient), ("llm_service", LLMClient)]
)
def test_a_worker_outlives_sighup(
    module: str, client: type[EncoderClient] | type[LLMClient], tmp_path: Path
) -> None:
    with process(module, "--store", f"shm://{tmp_path / 'tier'}") as worker:
        for _ in range(2):
            worker.process.send_signal(signal.SIGHUP)
        with client(worker.address) as caller:
            assert caller.describe().fingerprint
        assert worker.process.poll() is None
        assert worker.end(signal.SIGTERM) == 0
