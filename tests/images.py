"""The images of ``deploy/Dockerfile``, as it describes them: what a container of each runs."""

from __future__ import annotations

import json
import shlex
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
