"""Versions that must agree, and files that must be in the package."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import opticnerve
from opticnerve.pb import embedding_pb2, llm_pb2_grpc

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def floor(name):
    for requirement in PROJECT["project"]["dependencies"]:
        if match := re.fullmatch(rf"{re.escape(name)}>=([\d.]+)", requirement):
            return match[1]
    raise AssertionError(f"{name} has no floor")


def test_runtime_floors_are_those_of_the_generated_stubs():
    assert floor("grpcio") == llm_pb2_grpc.GRPC_GENERATED_VERSION
    assert floor("grpcio-health-checking") == floor("grpcio-reflection") == floor("grpcio")
    generated = Path(embedding_pb2.__file__).read_text()
    assert f"Protobuf Python Version: {floor('protobuf')}" in generated


def test_build_and_dev_generate_with_the_same_compiler():
    build = set(PROJECT["build-system"]["requires"])
    dev = set(PROJECT["project"]["optional-dependencies"]["dev"])
    pinned = {r for r in build if "==" in r}
    assert pinned and pinned <= dev


def test_constraints_satisfy_every_floor():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = version
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["openai"]]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), text


def test_the_demo_checkpoint_is_in_the_package():
    demo = Path(opticnerve.__file__).parent / "demo"
    assert (demo / "checkpoint" / "model.safetensors").stat().st_size > 5_000_000
    assert (demo / "pictures" / "star.png").is_file()


@pytest.mark.process
def test_stubs_are_not_in_git():
    tracked = subprocess.run(
        ["git", "ls-files", "opticnerve/pb"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode == 0:
        assert "_pb2" not in tracked.stdout


@pytest.mark.process
def test_the_command_prints_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "opticnerve", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"opticnerve {opticnerve.__version__}"
