"""OpticNerve: a disaggregated server for vision-language models.

Vision encoders, language decoders and a gateway run as services of their own and scale apart.
``opticnerve.serve(MODEL)`` runs all of them for one program; ``opticnerve.client`` speaks to the
internal services; the command line is ``opticnerve``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opticnerve.local.serve import serve

__version__ = "0.1.0"
__all__ = ["__version__", "serve"]


def __getattr__(name: str) -> Any:
    if name == "serve":  # Imported when asked for: most processes never start a stack.
        from opticnerve.local.serve import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
