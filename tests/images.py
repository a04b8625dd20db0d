"""The images of ``deploy/Dockerfile``, as it describes them: what a container of each runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TARGETS = ("gateway", "encoder", "llm")


@dataclass
class Stage:
    """One stage, with what it has from those that it is built on."""

    copies: list[str] = field(default_factory=list)  # Arguments of each COPY.
    runs: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # USER, ENTRYPOINT, ...: the last.

    def on(self) -> Stage:
        """A stage that begins as this one ended."""
        return Stage([*self.copies], [*self.runs], {**self.environment}, {**self.settings})

    def add(self, instruction: str, value: str) -> None:
        if instruction == "COPY":
            self.copies.append(value)
        elif instruction == "RUN":
            self.runs.append(value)
        elif instruction == "ENV":
            self.environment |= dict(word.split("=", 1) for word in shlex.split(value))
        else:
            self.settings[instruction] = value

    def command(self, instruction: str) -> list[str]:
        """The words of an ENTRYPOINT or HEALTHCHECK, which have the form of a JSON list."""
        value = self.settings[instruction]
        return list(json.loads(value[value.index("[") :]))


def read_stages() -> dict[str, Stage]:
    """Every stage by name."""
    stages: dict[str, Stage] = {}
    stage = Stage()
    with DOCKERFILE.open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    for entry in structure:
        instruction, value = entry["instruction"], entry["value"]
        if instruction == "FROM":
            origin, _, name = value.split()
            stages[name] = stage = stages.get(origin, Stage()).on()
        else:
            stage.add(instruction, value)
    return stages


def build_script(stage: str, root: Path, device: str = "cpu") -> str:
    """A stage's own RUN instructions for a shell, below ``root`` instead of ``/``."""
    stages = read_stages()
    runs = stages[stage].runs[len(stages["base"].runs) :]
    text = "\n".join(run.replace("\\\n", " ") for run in runs)
    for path in ("/opt/opticnerve", "/constraints.txt", "/wheels"):
        text = re.sub(rf"(?<![\w.]){path}", f"{root}{path}", text)
    return f"set -e\nDEVICE={device}\n{text}\n"


def copy_context(to: Path) -> None:
    """The files that .dockerignore lets through."""
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        source = ROOT / line[1:]
        if not line.startswith("!"):
            continue
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*_pb2*")
            shutil.copytree(source, to / source.name, ignore=ignored)
        else:
            shutil.copy(source, to / source.name)
