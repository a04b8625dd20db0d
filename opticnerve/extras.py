"""Optional packages: what needs one that is not installed says which extra brings it."""

from __future__ import annotations

from importlib.util import find_spec

from opticnerve.errors import StartupError

# Packages by extra, as pyproject.toml declares them and as they are imported.
PACKAGES = {
    "worker": ("torch", "transformers"),
    "openai": ("openai",),
    "onnx": ("onnxruntime",),
    "engine": ("onnx", "onnxscript"),
    "plan": ("simpy",),
    "top": ("rich",),
    "plot": ("matplotlib",),
    "otel": (
        "opentelemetry.sdk",
        "opentelemetry.exporter.otlp.proto.grpc",
        "opentelemetry.exporter.otlp.proto.http",
    ),
}


def require_extra(extra: str, user: str) -> None:
    """Raises StartupError unless every package of ``extra`` is installed; imports none of them.

    ``user`` is what needs them, as the message's subject.
    """
    for package in PACKAGES[extra]:
        if not _is_installed(package):
            raise StartupError(f"{user} needs {package}: pip install 'opticnerve[{extra}]'")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # Nor is the package that contains it.
        return False
