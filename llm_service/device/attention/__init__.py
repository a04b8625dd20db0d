"""Attention backends behind one interface; ``make_backend`` picks one by name."""

from __future__ import annotations

from llm_service.device.attention.base import AttentionBackend
from llm_service.device.attention.sdpa import SdpaBackend
from opticnerve.errors import ConfigError

_BACKENDS: dict[str, type[AttentionBackend]] = {"sdpa": SdpaBackend}


def make_backend(name: str) -> AttentionBackend:
    """The backend of that name; "auto" takes the best one for this machine. Raises ConfigError."""
    if name == "auto":
        name = "sdpa"
    if name not in _BACKENDS:
        known = ", ".join(sorted(_BACKENDS))
        raise ConfigError(f"there is no attention backend {name!r}; use auto, {known}")
    return _BACKENDS[name]()
