"""``opticnerve engine build|inspect|check``: engines of vision towers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from encoder_service.engines.sidecar import PRECISIONS, Parity, Sidecar
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.cli.commands import run
from opticnerve.config import ModelConfig, TelemetryConfig
from opticnerve.config.command_line import Parser, add_options, argument_type, check_environment
from opticnerve.config.encoder import ENGINE_BACKENDS
from opticnerve.config.options import Option, build, options
from opticnerve.extras import require_extra
from opticnerve.telemetry import logs

ENGINE = (
    "Engines of vision towers, for `opticnerve encoder MODEL --vision-engine DIR`. An engine is a "
    "tower exported and built for one library, one precision and pictures of given sizes."
)
COMMAND = (
    "build: exports a checkpoint's vision tower and builds an engine from it; inspect: shows what "
    "an engine is, and whether its files are intact; check: compares an engine with the torch "
    "tower on this machine. `opticnerve engine COMMAND --help` lists its flags"
)
BUILD = (
    "Exports the vision tower of MODEL and builds an engine from it. Pictures are padded to the "
    "smallest bucket that holds them. The engine's rows of probe pictures are compared with "
    "torch's, and an engine whose rows are too far off is refused."
)
INSPECT = "Shows what an engine is, and whether its files are those that were built."
CHECK = (
    "Loads an engine as an encoder does, and compares its rows of probe pictures with those of the "
    "torch tower of MODEL. Exit status: 0 if it may be served, 2 if not."
)


def main(argv: Sequence[str]) -> int:
    commands: Mapping[str, Callable[[Sequence[str]], int]] = {
        "build": build_command,
        "inspect": inspect_command,
        "check": check_command,
    }
    parser = Parser("engine", ENGINE, "build|inspect|check ...")
    group = parser.add_argument_group("Commands")
    group.add_argument("command", metavar="COMMAND", choices=commands, help=COMMAND)
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


# ---- build


def build_command(argv: Sequence[str]) -> int:
    parser = Parser("engine build", BUILD, "[MODEL] [flags]")
    _add_build_flags(parser)
    given, settings = _parse(parser, argv)
    from encoder_service.engines.build import BuildSettings, EngineBuild

    wanted = BuildSettings(
        settings,
        given["backend"],
        PRECISIONS.get(given["precision"], "auto"),
        given["buckets"],
        given["compute_capability"],
    )
    made = EngineBuild(wanted)
    directory = given["output"] or Path(
        _default_name(made.checkpoint, wanted.backend, made.precision)
    )
    sidecar = made.run(directory)
    print("\n".join(_describe(directory, sidecar)))
    words = ["opticnerve", "encoder", *([settings.model] if settings.model else [])]
    words += ["--revision", settings.revision] if settings.revision else []
    words += ["--download-dir", settings.download_dir] if settings.download_dir else []
    print("serve it:", shlex.join([*words, "--vision-engine", str(directory)]))
    return 0


def _add_build_flags(parser: Parser) -> None:
    group = parser.add_argument_group("Engine")
    group.add_argument(
        "--backend",
        choices=ENGINE_BACKENDS,
        default="tensorrt",
        help="library that runs the engine: NVIDIA TensorRT, TensorRT for RTX, or onnxruntime on a "
        "CPU (default: tensorrt)",
    )
    group.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="type in which it computes; auto: the checkpoint's, or fp32 for onnx (default: auto)",
    )
    group.add_argument(
        "--buckets",
        metavar="N,...",
        type=argument_type(_sizes),
        default=(),
        help="sizes in patches to which pictures are padded, in ascending order "
        "(default: 1024,4096,16384, or 256,1024,4096 for onnx, up to the largest picture)",
    )
    group.add_argument(
        "--compute-capability",
        metavar="N.N,...",
        type=argument_type(_capabilities),
        default=(),
        help="GPUs that TensorRT for RTX builds for, such as 8.9,12.0; this machine need not "
        "have them (default: that of this machine's GPU)",
    )
    group.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        help="directory to write (default: one here, named after MODEL, backend and precision)",
    )


def _default_name(checkpoint: Checkpoint, backend: str, precision: str) -> str:
    return f"{checkpoint.name.rpartition('/')[2]}-{backend}-{precision}"


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"expected numbers of patches in ascending order, got {text!r}")
    return sizes


def _capabilities(text: str) -> tuple[str, ...]:
    for part in text.split(","):
        major, _, minor = part.partition(".")
        if not (major.isdigit() and minor.isdigit() and len(minor) == 1):
            raise ValueError(f"expected compute capabilities such as 8.9,12.0, got {text!r}")
    return tuple(dict.fromkeys(text.split(",")))


# ---- inspect


def inspect_command(argv: Sequence[str]) -> int:
    parser = Parser("engine inspect", INSPECT, "DIR")
    group = parser.add_argument_group("Engine")
    group.add_argument("directory", metavar="DIR", type=Path, help="engine's directory")
    directory = parser.parse_args(argv).directory
    sidecar = Sidecar.read(directory)
    print("\n".join(_describe(directory, sidecar)))
    damage = [*sidecar.damage(directory)]
    for text in damage:
        print(f"damaged: {text}. Build it again: {sidecar.rebuild_command(directory)}")
    return 2 if damage else 0


def _describe(directory: Path, sidecar: Sidecar) -> Iterator[str]:
    """Everything that the sidecar holds, as lines of text."""
    size = sum(file.num_bytes for file in sidecar.files.values()) / 1e6
    where = ", ".join(sidecar.compute_capabilities)
    yield f"{directory}: {sidecar.family} tower of {sidecar.model or 'the demo'}, {size:.1f} MB"
    yield f"  backend      {sidecar.backend} in {sidecar.precision}"
    yield f"  built with   {sidecar.library} {sidecar.library_version}"
    yield f"  runs on      {'compute capability ' + where if where else 'a CPU'}"
    for bucket in sidecar.buckets:
        yield f"  bucket       {bucket.patches} patches, up to {bucket.pictures} pictures a call"
    yield from _parity_lines(sidecar.parity, sidecar.precision)
    yield f"  fingerprint  {sidecar.fingerprint}"
    for name, file in sidecar.files.items():
        yield f"  file         {name}: {file.num_bytes} bytes, SHA-256 {file.sha256}"


def _parity_lines(parity: Sequence[Parity] | None, precision: str) -> Iterator[str]:
    if parity is None:
        yield "  parity       not measured here; an encoder measures it before it serves"
        return
    for each in parity:
        yield f"  parity       {each.describe(precision)}"


# ---- check


def check_command(argv: Sequence[str]) -> int:
    parser = Parser("engine check", CHECK, "DIR [MODEL] [flags]")
    group = parser.add_argument_group("Engine")
    group.add_argument("directory", metavar="DIR", type=Path, help="engine's directory")
    given, settings = _parse(parser, argv)
    directory: Path = given["directory"]
    from encoder_service.engines.opening import check_engine

    checkpoint = Checkpoint.configured(settings, "encoder")
    sidecar, parity = check_engine(directory, checkpoint, settings)
    print("\n".join(_describe(directory, sidecar)))
    print("measured here, against torch in float32:")
    print("\n".join(_parity_lines(parity, sidecar.precision)))
    return 0


def _parse(parser: Parser, argv: Sequence[str]) -> tuple[dict[str, Any], ModelConfig]:
    """(given flags by name, the model's settings). Configures the log. Raises StartupError."""
    known: list[Option] = [o for o in options(ModelConfig) if o.name != "dtype"]
    add_options(parser, [*known, *(o for o in options(TelemetryConfig) if o.name == "log_level")])
    given = vars(parser.parse_args(argv))
    check_environment()
    logs.configure(build(TelemetryConfig, given).log_level, "text")
    require_extra("worker", "an engine")
    return given, build(ModelConfig, {**given, "dtype": "auto"})


if __name__ == "__main__":
    sys.exit(run(__name__, sys.argv[1:]))
