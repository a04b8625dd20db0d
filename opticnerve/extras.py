"""Optional packages: a feature whose package is missing names the extra to install."""

from __future__ import annotations

from importlib.util import find_spec

from opticnerve.errors import StartupError

# The extras of pyproject.toml, with the import names of their packages.
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

    ``user``: the feature that needs them, the subject of the message.
    """
    for package in PACKAGES[extra]:
        if not _is_installed(package):
            raise StartupError(f"{user} needs {package}: pip install 'opticnerve[{extra}]'")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # The parent package is missing.
        return False
