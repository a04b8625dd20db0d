"""The soak of bench/soak, in its short form: every request ends once, and rightly."""

import json
import subprocess
import sys

import pytest

from tests.redis import find_redis_server


@pytest.mark.slow
@pytest.mark.timeout(900)  # Two minutes, if nothing else runs.
@pytest.mark.skipif(
    find_redis_server() is None, reason="redis-server is not installed: make programs"
)
def test_every_request_ends_once_and_rightly_whatever_is_killed(tmp_path):
    command = [sys.executable, "-m", "bench.soak", "--minutes", "1", "--pictures", "6"]
    command += ["--gap", "1", "--seed", "3", "--out", str(tmp_path / "soak")]
    command += ["--logs", str(tmp_path / "logs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["wrong"] == []
    asked = found["requests"]
    assert found["faults"] and asked["picture"]["right"] > 0 and asked["plain"]["right"] >= 10
    assert (tmp_path / "soak.png").stat().st_size > 0
