"""NVIDIA TensorRT and TensorRT for RTX, whose Python modules agree in what is used here."""

from __future__ import annotations

import importlib
import logging
from collections import deque
from importlib.util import find_spec
from typing import Any

from opticnerve.errors import ConfigError

log = logging.getLogger(__name__)

KEPT_ERRORS = 20  # The last ones of a failure; all are in the log.
MODULES = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
INSTALL = {
    "tensorrt": "pip install tensorrt-cu13",
    "tensorrt_rtx": "pip install 'opticnerve[tensorrt-rtx]'",
}


class TensorrtLibrary:
    """One of the two libraries. ``errors`` holds the last errors that it reported since
    ``take_errors`` was called; the log has all of them."""

    def __init__(self, name: str) -> None:
        """``name``: a key of ``MODULES``. Raises ConfigError if it is not installed."""
        found = next((module for module in MODULES[name] if find_spec(module)), None)
        if found is None:
            raise ConfigError(
                f"--backend {name} needs its library: {INSTALL[name]}", param="backend"
            )
        try:
            self.module: Any = importlib.import_module(found)
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"{found} is installed but cannot be loaded: {error}", param="backend"
            ) from error
        self.name = name
        self.version = str(self.module.__version__)
        self.errors: deque[str] = deque(maxlen=KEPT_ERRORS)
        self.logger = _make_logger(self.module, self.errors)

    def take_errors(self) -> str:
        """The errors since the last call, as one text."""
        text = "; ".join(dict.fromkeys(self.errors)) or "it gave no reason"
        self.errors.clear()
        return text

    def compute_capability(self, capability: str) -> Any:
        """The library's constant for a capability such as "8.9". Raises ConfigError if it does not
        build for that."""
        known = self.module.ComputeCapability.__members__
        name = "SM" + capability.replace(".", "")
        if name not in known:
            able = ", ".join(f"{each[2:-1]}.{each[-1]}" for each in known if each.startswith("SM"))
            raise ConfigError(
                f"{self.name} {self.version} does not build for compute capability {capability}; "
                f"it does for {able}",
                param="compute_capability",
            )
        return known[name]


def _make_logger(module: Any, errors: deque[str]) -> Any:
    severity = module.ILogger.Severity

    class TensorrtLog(module.ILogger):  # type: ignore[misc]
        """Sends messages to this process's log."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                errors.append(message.strip())
                log.error("%s: %s", module.__name__, message.strip())
            elif level == severity.WARNING:
                log.warning("%s: %s", module.__name__, message.strip())

    return TensorrtLog()
