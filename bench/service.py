"""One of the product's services as a process of its own, which can be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from opticnerve.config import EncoderConfig, GatewayConfig, LLMConfig
from opticnerve.config.options import options, to_command_line
from opticnerve.errors import StartupError

Kind = Literal["encoder", "llm", "gateway"]
CONFIGS: dict[Kind, type] = {"encoder": EncoderConfig, "llm": LLMConfig, "gateway": GatewayConfig}
MODULES: dict[Kind, str] = {
    "encoder": "encoder_service",
    "llm": "llm_service",
    "gateway": "gateway",
}
STOP_S = 60.0


class Service:
    """``flags``: the service's, with underscores. The service ends with this process.

    ``module``: another module that serves with the same flags. ``variables``: added to its
    environment. Its logs are appended to ``<directory>/<name>.log``.
    """

    def __init__(
        self,
        kind: Kind,
        name: str,
        directory: Path,
        *,
        module: str = "",
        variables: dict[str, str] | None = None,
        **flags: Any,
    ) -> None:
        self.kind = kind
        self.name = name
        self.address = ""  # HOST:PORT, or a gateway's URL.
        self.log = directory / f"{name}.log"
        given = {"port": 0, "parent_pid": os.getpid(), **flags}
        arguments, secret = to_command_line(options(CONFIGS[kind]), given)
        self._command = [sys.executable, "-m", module or MODULES[kind], *arguments]
        self._variables = {"OMP_NUM_THREADS": "1", **(variables or {}), **secret}
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The process id; 0 while it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    def start(self) -> None:
        """Starts the process; call ``listening`` to wait for its address."""
        with open(self.log, "a") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, **self._variables},
            )

    def listening(self) -> str:
        """Waits until it listens, and returns its address. Raises StartupError if it ends
        before."""
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            if line.startswith("listening "):
                self.address = line.split()[1]
                return self.address
        last = self.log.read_text().splitlines()[-3:]
        raise StartupError(f"{self.name} did not start: {' '.join(last)}")

    def kill(self) -> None:
        """Sends SIGKILL to it and to everything that it started, if it runs: once it was reaped,
        the id of its group may be another's."""
        assert self._process
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._reap()

    def signal(self, number: int) -> None:
        assert self._process
        self._process.send_signal(number)

    def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL if it has not ended after STOP_S."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reap()

    def _reap(self) -> None:
        assert self._process and self._process.stdout
        self._process.wait()
        self._process.stdout.close()
