"""Logs of every service, one line a record, with the request's id where there is one.

Records go to stderr. Keys, media bytes and prompts are never logged.
"""

from __future__ import annotations

import logging
import re
import sys
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")

FORMAT = "%(asctime)s %(levelname).1s %(name)s [%(request_id)s] %(message)s"


MAX_ID = 128  # Characters of a request's id.
_UNPRINTABLE = re.compile(r"[^ -~]")


def printable(text: str, limit: int) -> str:
    """The first characters of what somebody else wrote, on one line and in ASCII: in a log it
    can pretend to be no other record, and drive no terminal."""
    shown = _UNPRINTABLE.sub("?", text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


class _RequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = printable(request_id.get(), MAX_ID)
        return True


def configure(level: str) -> None:
    """Sets the process's root logger up; called once, by a service's main."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    handler.addFilter(_RequestId())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "grpc", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
