"""Internal services as processes of their own, for tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_S = 200.0
END_S = 100.0


class Process:
    """``python -m MODULE`` with one thread and more flags. What it logs is kept.

    Starts at once; ``address`` is known when the process has bound its port.
    """

    def __init__(self, module: str, *flags: str) -> None:
        command = [sys.executable, "-m", module, "--threads", "1", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._log.extend(self.process.stderr)

    def log(self) -> str:
        """All that an ended process wrote to stderr."""
        self.process.wait(END_S)
        self._reader.join(END_S)
        return "".join(self._log)

    @contextlib.contextmanager
    def until_ready(self) -> Iterator[Process]:
        """Waits for SERVING; the process is gone at the end, whatever happened."""
        try:
            self._wait_ready()
            yield self
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(END_S)
            self._reader.join(END_S)
            if self.process.stdout is not None:
                self.process.stdout.close()

    def _wait_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening "), self.log()
        self.address = line.split()[1]
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            deadline = time.monotonic() + START_S
            while time.monotonic() < deadline:
                assert self.process.poll() is None, self.log()
                with contextlib.suppress(grpc.RpcError):  # Too busy with loading to answer.
                    answer = stub.Check(
                        health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True
                    )
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                time.sleep(0.05)
        raise AssertionError("the service did not become ready")

    def end(self, number: int) -> int:
        """Sends a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(END_S)


@contextlib.contextmanager
def process(module: str, *flags: str) -> Iterator[Process]:
    """A service that serves, for as long as the context lasts."""
    with Process(module, *flags).until_ready() as ready:
        yield ready
