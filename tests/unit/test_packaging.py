"""Versions that must agree, and files that must be in the package."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import opticnerve
from opticnerve import extras
from opticnerve.errors import StartupError
from opticnerve.pb import embedding_pb2, llm_pb2_grpc

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PRODUCT = ("encoder_service", "gateway", "llm_service", "opticnerve")

# The product's modules that may import what an extra brings, beside the base dependencies.
PLACES = {
    "worker": (
        "encoder_service/",
        "llm_service/",
        "opticnerve/checkpoints/experts.py",
        "opticnerve/checkpoints/loader.py",
        "opticnerve/embeddings/",
        "opticnerve/models/",
        "opticnerve/tensors/dtypes.py",
        "opticnerve/verification/",
    ),
    "openai": ("opticnerve/local/serve.py",),
    "onnx": ("encoder_service/backends/onnx_runtime.py",),
    "otel": ("opticnerve/telemetry/traces.py",),
    "plan": ("opticnerve/planner/",),
    "top": ("opticnerve/cli/top.py", "opticnerve/cli/top_view.py"),
    "plot": ("opticnerve/benchmark/plot.py",),
}
# Extras whose packages others import: torch's exporter, and the library that a name chooses.
INDIRECT = ("engine", "tensorrt-rtx")
ONE_MACHINE = {"worker", "openai", "top"}  # Extras of "all".


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
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = version
    groups = [
        PROJECT["project"]["dependencies"],
        *(EXTRAS[name] for name in (*PLACES, *INDIRECT, "dev")),
    ]
    for text in (text for group in groups for text in group):
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), text


# ---- what is imported is declared, and the other way round


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported_packages(path):
    """Top-level names that a module imports at run time, wherever in it."""

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return {name.partition(".")[0] for name in visit(ast.parse(path.read_text()))}


def imports():
    """Modules of the product by the distributions that they import; one of several names that
    bring the same package counts (``google``)."""
    brought_by = importlib.metadata.packages_distributions()
    declared = names(PROJECT["project"]["dependencies"]).union(*(map(names, EXTRAS.values())))
    found = defaultdict(set)
    for path in (path for package in PRODUCT for path in (ROOT / package).rglob("*.py")):
        if path.parent.name == "pb":
            continue
        for name in imported_packages(path) - set(PRODUCT) - sys.stdlib_module_names:
            bring = {canonicalize_name(each) for each in brought_by[name]}
            for distribution in (bring & declared) or bring:
                found[distribution].add(str(path.relative_to(ROOT)))
    return found


def test_every_import_is_declared_where_it_is_needed_and_every_declaration_is_imported():
    base = names(PROJECT["project"]["dependencies"])
    found = imports()
    for distribution, modules in found.items():
        extra = next((name for name in PLACES if distribution in names(EXTRAS[name])), None)
        places = PLACES.get(extra, ())
        outside = {module for module in modules if not module.startswith(places)}
        assert distribution in base or not outside, f"{distribution}: {sorted(outside)}"
        assert distribution not in base or extra is None, f"{distribution} is declared twice"
    assert base.union(*(names(EXTRAS[name]) for name in PLACES)) <= found.keys()
    for distribution in base:
        outside = {m for m in found[distribution] if not m.startswith(PLACES["worker"])}
        assert outside, f"{distribution} is needed by workers alone"


def test_no_extra_is_without_a_place():
    assert set(EXTRAS) == {*PLACES, *INDIRECT, "all", "dev"}
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).extras == ONE_MACHINE
    for extra, packages in extras.PACKAGES.items():
        assert set(map(canonicalize_name, packages)) == names(EXTRAS[extra])
    assert PLACES.keys() <= extras.PACKAGES.keys()


def test_make_installs_every_extra():
    installed = re.search(r"-e '\.\[([a-z,-]+)\]'", (ROOT / "Makefile").read_text())
    assert installed and {*installed[1].split(","), *ONE_MACHINE} == set(EXTRAS)


def test_what_needs_an_extra_names_it(monkeypatch):
    extras.require_extra("worker", "an encoder")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(StartupError) as caught:
        extras.require_extra("worker", "an encoder")
    assert caught.value.message == "an encoder needs torch: pip install 'opticnerve[worker]'"


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
