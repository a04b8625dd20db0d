"""The command line: finds the module of a command by name and calls its ``main``."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence

from opticnerve import __version__
from opticnerve.errors import StartupError, did_you_mean
from opticnerve.telemetry import logs

COMMANDS = {
    "up": ("opticnerve.local.up", "encoders, LLM workers and a gateway on this machine"),
    "gateway": ("gateway.__main__", "the HTTP front: OpenAI's API, templates, routing"),
    "encoder": ("encoder_service.__main__", "a vision encoder: pictures to embeddings"),
    "engine": (
        "encoder_service.engines.command",
        "engines of vision towers: TensorRT, onnxruntime",
    ),
    "llm": ("llm_service.__main__", "an LLM decoder: tokens and embeddings to tokens"),
    "check": ("opticnerve.cli.check", "whether a checkpoint will be served, from its files alone"),
    "verify": ("opticnerve.cli.verify", "the split model against the whole one, on your machine"),
    "health": ("opticnerve.cli.health", "whether a worker or a gateway serves; for probes"),
    "top": ("opticnerve.cli.top", "a gateway and its pools as they are now, in the terminal"),
    "ask": ("opticnerve.cli.ask", "ask about pictures; the answer is streamed"),
    "batch": ("opticnerve.cli.batch", "answer a file of requests, in OpenAI's batch format"),
    "bench": ("opticnerve.benchmark.command", "load on any server with OpenAI's API, measured"),
    "plan": ("opticnerve.planner.command", "how many workers of each pool some traffic needs"),
    "demo": ("opticnerve.demo.show", "the built-in checkpoint answers about bundled pictures"),
}
PREFIX = "opticnerve: "  # Begins the error line of a command that could not start.


def usage() -> str:
    lines = [f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: opticnerve COMMAND [MODEL] [flags]",
            "",
            "Serves vision-language models: encoders, LLM workers, a gateway in front.",
            "",
            *lines,
            "",
            "Begin with:  opticnerve demo",
            "then:        opticnerve up MODEL",
            "",
            "`opticnerve COMMAND --help` lists a command's flags. Every flag has an environment",
            "twin: --max-num-seqs is OPTICNERVE_MAX_NUM_SEQS.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status, 2 if it could not start."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"opticnerve {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"opticnerve: there is no command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    quiet_grpc()
    wait_briefly()
    return run(COMMANDS[name][0], rest)


def quiet_grpc() -> None:
    """Keeps informational lines of gRPC's C library off stderr, here and in child processes.

    Call it before gRPC is imported, which reads the variable once. A value set by the user is kept.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def wait_briefly() -> None:
    """Makes idle OpenMP threads spin for less than 0.1 ms, here and in child processes. By default
    GNU's OpenMP spins for milliseconds, which takes cores from other processes.

    Call it before torch is imported, which reads the variables once. Values set by the user are
    kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # The same for LLVM's OpenMP, in ms.


def run(module: str, argv: Sequence[str]) -> int:
    """Calls ``main(argv)`` of a module; a StartupError becomes its message and status 2."""
    # Freezing spares the collection at exit, which takes seconds over torch's objects.
    atexit.register(gc.freeze)
    try:
        return int(importlib.import_module(module).main(argv) or 0)
    except StartupError as error:
        logs.say(PREFIX + error.message)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # The reader closed the pipe: `opticnerve ask ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
