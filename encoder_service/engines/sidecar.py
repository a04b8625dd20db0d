"""An engine's directory: the files that a runtime loads, and a sidecar that says what they are.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, TypeAdapter

from encoder_service.backends.base import Bucket
from opticnerve.config.encoder import ENGINE_BACKENDS, SIDECAR
from opticnerve.config.shared import CheckpointConfig
from opticnerve.errors import UnusableEngine
from opticnerve.tensors.distance import LIMITS, Distance

GRAPH_FILE, PLAN_FILE, PROBES_FILE = "tower.onnx", "tower.plan", "probes.safetensors"
FORMAT: Final = 2
MAX_BYTES = 2**20
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # By flag.


@dataclass(frozen=True, slots=True)
class Parity:
    """How near the rows of a bucket's probe pictures are to the torch tower's in float32."""

    patches: int  # The bucket's.
    distance: Distance

    def describe(self, precision: str) -> str:
        """The figures, and the limits that they are held to."""
        return f"{self.patches} patches: {self.distance.describe(LIMITS[precision])}"


@dataclass(frozen=True, slots=True)
class File:
    num_bytes: int
    sha256: str


def _one_of(*known: str) -> AfterValidator:
    """A validator that refuses other texts."""

    def check(text: str) -> str:
        if text not in known:
            raise ValueError(f"{text!r} is none of {', '.join(known)}")
        return text

    return AfterValidator(check)


def _ascending(buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    sizes = [0, *(bucket.patches for bucket in buckets)]
    if sizes != sorted(set(sizes)) or any(bucket.pictures < 1 for bucket in buckets):
        raise ValueError("buckets should ascend, and hold a picture each")
    return buckets


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What an engine is. ``engine.json`` holds it as JSON."""

    model: str | None  # As it was given to the build; None: the demo.
    revision: str | None  # As it was given.
    family: str
    fingerprint: str  # Its encoder's, which names checkpoint, backend and precision.
    backend: Annotated[str, _one_of(*ENGINE_BACKENDS)]
    precision: Annotated[str, _one_of(*PRECISIONS.values())]
    buckets: Annotated[tuple[Bucket, ...], Field(min_length=1), AfterValidator(_ascending)]
    library: str  # The module that built it, and runs it.
    library_version: str
    compute_capabilities: tuple[str, ...]  # Such as "8.9"; none: a CPU.
    made_by: str  # What made the probes' pixels: releases of OpticNerve and Pillow.
    probes: tuple[str, ...]  # SHA-256 of each probe's pixels.
    files: Mapping[str, File]  # By name.
    parity: tuple[Parity, ...] | None  # By bucket; None: not measured where it was built.
    format: Literal[2]

    def write(self, directory: Path) -> None:
        (directory / SIDECAR).write_bytes(_reader().dump_json(self, indent=2) + b"\n")

    @classmethod
    def read(cls, directory: Path) -> Sidecar:
        """Raises UnusableEngine for a directory without a sidecar that can be read."""
        path = directory / SIDECAR
        try:
            with path.open("rb") as stream:
                return _reader().validate_json(stream.read(MAX_BYTES))
        except FileNotFoundError as error:
            raise UnusableEngine(
                f"{directory} holds no engine: {SIDECAR} is missing. Build one with "
                "`opticnerve engine build`"
            ) from error
        except (OSError, ValueError) as error:
            raise UnusableEngine(
                f"{path} cannot be read as an engine's sidecar; build the engine again"
            ) from error

    def rebuild_command(
        self,
        directory: Path,
        capability: str | None = None,
        served: CheckpointConfig | None = None,
    ) -> str:
        """The command that builds the engine again. ``capability``: of the device to build for;
        None: those that it was built for. ``served``: the checkpoint to build from; None: the one
        that it was built from."""
        model = served or CheckpointConfig(self.model, self.revision)
        words = ["opticnerve", "engine", "build", *([model.model] if model.model else [])]
        words += ["--revision", model.revision] if model.revision else []
        words += ["--download-dir", model.download_dir] if model.download_dir else []
        words += ["--backend", self.backend]
        flag = next((flag for flag, name in PRECISIONS.items() if name == self.precision), "auto")
        words += ["--precision", flag]
        words += ["--buckets", ",".join(str(bucket.patches) for bucket in self.buckets)]
        if self.backend == "tensorrt_rtx":
            wanted = (capability,) if capability else self.compute_capabilities
            words += ["--compute-capability", ",".join(wanted)]
        return shlex.join([*words, "-o", str(directory)])

    def obstacles(
        self, *, library_version: str | None, fingerprint: str | None, capability: str | None
    ) -> Iterator[str]:
        """The reasons why the engine cannot be served here. What is given as None is unknown and
        not checked. ``capability``: of the device that would run it."""
        if fingerprint is not None and fingerprint != self.fingerprint:
            yield (
                "it was built from another checkpoint, with other processor settings, or by a "
                "version of OpticNerve that computes fingerprints in another way (its fingerprint "
                f"is {self.fingerprint[:12]}…, this encoder's is {fingerprint[:12]}…)"
            )
        if library_version is not None and library_version != self.library_version:
            yield (
                f"it was built with {self.library} {self.library_version}, here is "
                f"{library_version}"
            )
        if capability is not None and capability not in self.compute_capabilities:
            built = ", ".join(self.compute_capabilities) or "a CPU"
            yield f"it was built for compute capability {built}, this device has {capability}"

    def damage(self, directory: Path) -> Iterator[str]:
        """Describes files that are missing, foreign or not as they were built. Reads them all."""
        engine_file = GRAPH_FILE if self.backend == "onnx" else PLAN_FILE
        for name in (engine_file, PROBES_FILE):
            if name not in self.files:
                yield f"{SIDECAR} does not name {name}"
        with contextlib.suppress(OSError):
            found_names = {path.name for path in directory.iterdir()} - {SIDECAR}
            for name in sorted(found_names - self.files.keys()):
                yield f"{name} is no file of the engine"
        for name, built in self.files.items():
            if Path(name).name != name:
                yield f"{name} is no file of the directory"
                continue
            try:
                found = describe_file(directory / name)
            except OSError:
                yield f"{name} is missing or cannot be read"
                continue
            if found != built:
                yield f"{name} is not the file that was built"


@cache
def _reader() -> TypeAdapter[Sidecar]:
    return TypeAdapter(Sidecar)


def describe_file(path: Path) -> File:
    """The size and the SHA-256 of a file. Raises OSError."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(path.stat().st_size, digest)


def describe_files(directory: Path) -> dict[str, File]:
    """Every file of an engine's directory but the sidecar."""
    paths = sorted(path for path in directory.iterdir() if path.name != SIDECAR)
    return {path.name: describe_file(path) for path in paths}
