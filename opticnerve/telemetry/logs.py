"""Logs of every service: one line a record on stderr, as text for people or JSON for machines.

A record is a message and, where it tells of an event, fields. ``Formatter`` alone writes both
forms: ``2026-11-25T16:02:43.123+00:00 I gateway.service [req-1] request status=200 ms=12.3``,
with what belongs to the line before on indented lines after it, or one JSON object a line. What
others wrote is bounded, and can end no line and drive no terminal.

Keys, media bytes and prompts are never logged. ``opticnerve.telemetry.events`` has the line that
each request leaves.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
from contextvars import ContextVar
from datetime import datetime
from types import TracebackType
from typing import Any

MAX_ID = 128  # Characters of a request's id,
MAX_VALUE = 160  # of a field's text, an error's message among them,
MAX_VALUES = 16  # entries of a field that is a list,
MAX_MESSAGE = 4_000  # characters of a message,
MAX_TRACEBACK = 16_000  # and of a traceback, whose end is kept.

_UNPRINTABLE = re.compile(r"[^ -~]")
_UNSAFE_IN_ID = re.compile(r"[^A-Za-z0-9._:@/+=-]")
_BARE = re.compile(r"[^\s\"'=\\]+")  # A value that needs no quotes.
_INDENT = "\n    "

log = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="-")


def printable(text: str, limit: int) -> str:
    """The first characters of what somebody else wrote, on one line and in ASCII: in a log it
    can pretend to be no other record, and drive no terminal."""
    shown = _UNPRINTABLE.sub("?", text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def safe_id(text: str) -> str:
    """A request's id as it is logged and handed on, without what is unsafe in it."""
    return _UNSAFE_IN_ID.sub("", text[: 2 * MAX_ID])[:MAX_ID]


# ---- lines


class Formatter(logging.Formatter):
    """Writes records, foreign ones too. ``form``: ``--log-format``."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        when, identity = stamp(record.created), safe_id(request_id.get())
        fields = {name: _plain(value) for name, value in getattr(record, "fields", {}).items()}
        message, trace = record.getMessage()[:MAX_MESSAGE], self._traceback(record)
        if self.form == "text":
            words = [message, *(f"{name}={_quoted(value)}" for name, value in fields.items())]
            head = f"{when} {record.levelname[0]} {record.name} [{identity}] "
            return _clean(head + " ".join(words) + (f"\n{trace}" if trace else ""))
        values = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "request": identity,
            "message": message,
            **fields,
        }
        return json.dumps({**values, "exception": trace} if trace else values)

    def _traceback(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n".join(filter(None, (trace, record.stack_info)))[-MAX_TRACEBACK:]


def stamp(seconds: float) -> str:
    """A time in ISO 8601, to the millisecond, with the offset of this machine's zone."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


def _plain(value: Any) -> Any:
    """What JSON has: texts within bounds, and numbers as exact as anybody reads them."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return round(value, 1) if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value[:MAX_VALUES]]
    return printable(str(value), MAX_VALUE)


def _quoted(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


def _clean(text: str) -> str:
    """``text`` with every line but the first indented, so that none looks like a record."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _INDENT if c == "\n" else "?" for c in text)


# ---- a process


def configure(level: str, form: str = "text") -> None:
    """Sets the process's root logger up; called once, by a command's main. What Python itself
    would print on stderr, warnings and what ends the process or a thread, becomes records."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(form))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Those of HTTP tell whole URLs, which may hold keys.
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "grpc", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
    if form == "json":
        sys.excepthook = _unexpected
        threading.excepthook = _unexpected_in_thread
        if os.environ.get("GRPC_VERBOSITY", "ERROR") == "ERROR":
            os.environ["GRPC_VERBOSITY"] = "NONE"  # Its C library knows no JSON.


def _form() -> str:
    """The one that this process was configured with."""
    forms = (getattr(handler.formatter, "form", "") for handler in logging.getLogger().handlers)
    return next(filter(None, forms), "text")


def say(text: str) -> None:
    """The last words of a command, to whoever typed it: as they are, or as a record of JSON."""
    if _form() == "json":
        log.critical(text)
    else:
        print(text, file=sys.stderr)


def relayed(source: str, line: str) -> str:
    """What ``source``, a child of this process, wrote on its stderr, as a line of ours."""
    if _form() == "text":
        return f"{source:<10} | {line}"
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):  # Written by a library that does not know how we log.
        values = {"time": stamp(time.time()), "level": "info", "logger": "stderr", "message": line}
    return json.dumps({"process": source, **values})


def _unexpected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("the process ends by an error that nobody expected", exc_info=error)


def _unexpected_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        log.error("a thread ends by an error that nobody expected", exc_info=args.exc_value)
