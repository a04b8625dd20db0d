"""Build hook: generates the gRPC stubs from ``protos/`` into ``opticnerve/pb``.

The include path is mapped (``-Iopticnerve/pb=protos``), so that the generated imports are
right as they are written; nothing edits generated code. Also runs alone: ``make protos``.
"""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
OUT = ROOT / "opticnerve" / "pb"


def generate() -> None:
    """Writes ``*_pb2.py``, ``*_pb2_grpc.py`` and their type stubs; raises if protoc refuses."""
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    plugins = []
    for name in ("mypy", "mypy_grpc"):
        path = shutil.which(f"protoc-gen-{name}", path=search)
        if path is None:
            raise RuntimeError(f"protoc-gen-{name} is missing; install mypy-protobuf")
        plugins.append(f"--plugin=protoc-gen-{name}={path}")
    protos = sorted(path.name for path in (ROOT / "protos").glob("*.proto"))
    for stale in OUT.glob("*_pb2*"):
        stale.unlink()
    arguments = [
        "protoc",
        f"-Iopticnerve/pb={ROOT / 'protos'}",
        *plugins,
        f"--python_out={ROOT}",
        f"--grpc_python_out={ROOT}",
        f"--mypy_out=quiet:{ROOT}",
        f"--mypy_grpc_out=quiet:{ROOT}",
        *(f"opticnerve/pb/{name}" for name in protos),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed; its message stands above")
    for empty in OUT.glob("embedding_pb2_grpc.py*"):  # No service is defined there.
        empty.unlink()


class StubHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if (ROOT / "protos").is_dir():
            generate()


if __name__ == "__main__":
    generate()
