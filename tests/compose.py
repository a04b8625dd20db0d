"""The services of ``deploy/compose.yaml`` as processes here: each one's command line with its
environment, in a directory of its own. Names of containers become ports of this machine."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import yaml

from opticnerve.demo.chats import PICTURES, TURNS, Turn
from tests.images import ROOT, Stage, read_stages
from tests.system import free_port, wait_for

DEPLOY = ROOT / "deploy"
START_S, ASK_S, END_S = 250.0, 100.0, 60.0
PORTS = {"gateway": (8000, 9000), "redis": (6379,), "prometheus": (9090,), "grafana": (3000,)}
WORKER_PORTS = (7000, 9000)
# What the images of others run before a command's words.
ENTRYPOINTS = {"redis": (), "prometheus": ("prometheus",)}
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")


def read_compose(
    name: str = "compose.yaml", variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The file with its variables replaced, by default those that deploy/secrets.sh writes."""
    given = {"OPTICNERVE_SECRETS_GID": "1000"} if variables is None else variables

    def value(match: re.Match[str]) -> str:
        name, operator, text = match.groups()
        if name not in given and operator not in ("-", ":-"):
            raise KeyError(f"{name}: {text}")
        return given.get(name, text)

    loaded: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(value, (DEPLOY / name).read_text()))
    return loaded


@dataclass
class Service:
    """One service: what its container runs, with which environment."""

    name: str
    settings: dict[str, Any]
    stage: Stage | None = None  # Of our own images.

    @property
    def target(self) -> str:
        """Of the Dockerfile; empty for the images of others."""
        target: str = self.settings.get("build", {}).get("target", "")
        return target

    @property
    def command(self) -> list[str]:
        """Every word that the container runs."""
        words = self.settings.get("command", "")
        words = shlex.split(words) if isinstance(words, str) else [str(word) for word in words]
        if self.stage is None:
            return [*ENTRYPOINTS[self.name], *words]
        return [*self.stage.command("ENTRYPOINT"), *words]

    @property
    def check(self) -> list[str]:
        """The words of its health check."""
        if self.stage is not None:
            return self.stage.command("HEALTHCHECK")
        kind, *words = self.settings["healthcheck"]["test"]
        return ["sh", "-c", *words] if kind == "CMD-SHELL" else words

    @property
    def environment(self) -> dict[str, str]:
        image = dict(self.stage.environment) if self.stage else {}
        own = self.settings.get("environment", {})
        given = {name: str(value) for name, value in own.items() if value is not None}
        return image | given


def read_services() -> dict[str, Service]:
    stages = read_stages()
    found = {}
    for name, settings in read_compose()["services"].items():
        service = found[name] = Service(name, settings)
        service.stage = stages.get(service.target)
    return found


@dataclass
class LocalStack:
    """The services as processes below one directory."""

    directory: Path
    # The environments of our images, by the name of their target; by default this one.
    environments: Mapping[str, Path] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=read_services)
    ports: dict[tuple[str, int], int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.services:
            for port in PORTS.get(name, WORKER_PORTS):
                while (ours := free_port()) in self.ports.values():
                    pass  # It is free as long as nobody listens there.
                self.ports[name, port] = ours
        shutil.copytree(DEPLOY, self.deploy, ignore=shutil.ignore_patterns("secrets", ".env"))
        subprocess.run(["sh", str(self.deploy / "secrets.sh")], check=True, capture_output=True)
        for path in (*(self.deploy / "secrets").iterdir(), *self.deploy.glob("prometheus/*")):
            path.chmod(0o600)
            path.write_text(self.here(path.read_text()))
        self._hurry(self.deploy / "prometheus" / "prometheus.yml")

    @staticmethod
    def _hurry(path: Path) -> None:
        """Prometheus scrapes often, so that tests need not wait."""
        path.write_text(re.sub(r"(_interval): \d+s", r"\1: 1s", path.read_text()))

    @property
    def deploy(self) -> Path:
        """A copy of deploy/ with secrets of its own, and with addresses of this machine."""
        return self.directory / "deploy"

    def here(self, text: str, own: str = "") -> str:
        """A text of a container, with the ports and paths that it has here; ``own``: whose."""
        for (name, port), ours in self.ports.items():
            text = re.sub(rf"\b{name}:{port}\b", f"127.0.0.1:{ours}", text)
            if name == own:
                text = re.sub(rf"(?<![\d/.]){port}(?!\d)", str(ours), text)
        text = text.replace("/run/secrets/", f"{self.deploy}/secrets/")
        text = text.replace("/etc/prometheus", f"{self.deploy}/prometheus")
        return text.replace("--storage.tsdb.path=/prometheus", "--storage.tsdb.path=data")

    def url(self, name: str, port: int) -> str:
        return f"http://127.0.0.1:{self.ports[name, port]}"

    def secret(self, name: str) -> str:
        return (self.deploy / "secrets" / name).read_text().strip()

    def words(self, service: Service, words: list[str]) -> list[str]:
        """A command of a container as it runs here; ours by its image's environment."""
        translated = [self.here(word, service.name) for word in words]
        if words[0] != "opticnerve":
            return translated
        environment = self.environments.get(service.target)
        python = str(environment / "bin" / "python") if environment else sys.executable
        return [python, "-m", *translated]

    def environment(self, service: Service, directory: Path) -> dict[str, str]:
        ours = {n: v for n, v in os.environ.items() if not n.startswith("OPTICNERVE_")}
        given = {n: self.here(v, service.name) for n, v in service.environment.items()}
        given |= {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "OPTICNERVE_THREADS": "1"}
        given |= {"PYTHONPATH": "" if self.environments else str(ROOT)}
        given |= {name: str(directory) for name in ("HOME", "HF_HOME", "OPTICNERVE_CACHE_DIR")}
        return ours | given

    def start(self, name: str) -> None:
        service, directory = self.services[name], self.directory / name
        directory.mkdir()
        with (directory / "log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self.words(service, service.command),
                cwd=directory, env=self.environment(service, directory), stdout=log, stderr=log,
            )  # fmt: skip

    def check_running(self) -> None:
        """Fails if a process has ended."""
        for name, process in self.processes.items():
            assert process.poll() is None, (self.directory / name / "log").read_text()

    def healthy(self, name: str) -> bool:
        """Whether the container's health check passes."""
        service = self.services[name]
        environment = self.environment(service, self.directory / name)
        check = self.words(service, service.check)
        return subprocess.run(check, env=environment, capture_output=True).returncode == 0

    def serves_pictures(self) -> bool:
        """Whether the gateway says so. Fails if a process has ended."""
        self.check_running()
        url = f"{self.url('gateway', 8000)}/ready?pictures=true"
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(url, trust_env=False).status_code == 200
        return False

    def ask(self, turn: Turn = TURNS[0]) -> str:
        """The answer to a question about a picture."""
        data = base64.b64encode((PICTURES / turn.pictures[0]).read_bytes()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        content = [picture, {"type": "text", "text": turn.question}]
        messages = [{"role": "user", "content": content}]
        key = self.secret("api-keys").removeprefix("admin: ")
        answer = httpx2.post(
            f"{self.url('gateway', 8000)}/v1/chat/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"model": "model", "temperature": 0, "messages": messages},
            timeout=ASK_S,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text

    @contextlib.contextmanager
    def running(self, *names: str) -> Iterator[LocalStack]:
        """Services that serve pictures, started in this order and ended in the reverse one."""
        try:
            for name in names:
                self.start(name)
            wait_for("pictures to be served", self.serves_pictures, START_S)
            yield self
        finally:
            for process in reversed(self.processes.values()):
                process.terminate()
                process.wait(END_S)
