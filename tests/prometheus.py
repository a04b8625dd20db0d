"""A real Prometheus for tests, and what is asked of it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from tests.system import free_port, wait_for

END_S = 30.0


def find_prometheus() -> str | None:
    return shutil.which("prometheus")


class Prometheus:
    """What a Prometheus at ``url`` answers."""

    def __init__(self, url: str) -> None:
        self._client = httpx2.Client(base_url=url, trust_env=False)

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of an answer of its API. Raises ValueError with its message if it is an error,
        such as a query that does not parse."""
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        return answer["data"]

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of every series that an expression is, now or at a time that was."""
        when = {} if at is None else {"time": f"{at:.3f}"}
        result = self.get("query", query=expression, **when)["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def time_of(self, expression: str) -> float | None:
        """The present time, if the expression is anything now."""
        result = self.get("query", query=expression)["result"]
        return float(result[0]["value"][0]) if result else None

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return self._client.get("/-/ready").status_code == 200
        return False


@contextlib.contextmanager
def running(directory: Path, configuration: str) -> Iterator[Prometheus]:
    """A Prometheus with this configuration, its data and its log in ``directory``."""
    program = find_prometheus()
    assert program is not None
    (directory / "prometheus.yml").write_text(configuration)
    address = f"127.0.0.1:{free_port()}"
    flags = ["--config.file=prometheus.yml", f"--web.listen-address={address}"]
    flags += ["--storage.tsdb.path=data"]  # Debian's default is one for the whole machine.
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, *flags], cwd=directory, stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://{address}")
        wait_for("Prometheus to be ready", prometheus.is_ready)
        yield prometheus
    finally:
        process.terminate()
        process.wait(END_S)
