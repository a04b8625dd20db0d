"""The soak of bench/soak, in its short form: every request ends once, and rightly."""

import json
import subprocess
import sys

import pytest

from tests.redis import find_redis_server


def soak(directory, *flags):
    """Runs it to its end: (exit status, what it printed)."""
    command = [sys.executable, "-m", "bench.soak", *flags, "--out", str(directory / "soak")]
    command += ["--logs", str(directory / "logs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            said, _ = process.communicate()
        finally:
            process.terminate()  # At this test's own timeout: it stops what it started.
    return process.returncode, said.decode()


@pytest.mark.slow
@pytest.mark.timeout(900)  # Under two minutes, if nothing else runs.
@pytest.mark.skipif(
    find_redis_server() is None, reason="redis-server is not installed: make programs"
)
def test_every_request_ends_once_and_rightly_whatever_is_killed(tmp_path):
    status, said = soak(tmp_path, "--minutes", "1", "--pictures", "6", "--gap", "1", "--seed", "3")
    assert status == 0, said[-20_000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["wrong"] == []
    asked = found["requests"]
    assert found["faults"] and asked["picture"]["right"] > 0 and asked["plain"]["right"] >= 10
    assert (tmp_path / "soak.png").stat().st_size > 0
