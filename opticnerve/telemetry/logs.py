"""Logs of every service on stderr: one record a line, as text for people or JSON for machines.

A record is a message and, for an event, fields. ``Formatter`` writes both forms:
``2026-11-25T16:02:43.123+00:00 I gateway.service [req-1] request status=200 ms=12.3``, with
continuation lines (a traceback, say) indented below, or one JSON object a line. Text from outside
is cut to a length and stripped of line ends and control characters.

Each process logs one line, an event, for each request that it served. The code around a request
(``gateway.edge.middleware``, ``opticnerve.rpc.calls``) begins the event, and writes it when the
request ends, however it ends. Any code that serves the request adds fields with ``note``,
``append`` and ``failed``. Keys, media bytes and prompts are never logged.
"""

from __future__ import annotations

import asyncio
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

from opticnerve.errors import OpticNerveError
from opticnerve.telemetry import traces

MAX_ID = 128  # Characters of a request's id.
MAX_VALUE = 160  # Characters of a field's text, such as an error's message.
MAX_VALUES = 16  # Entries of a field that is a list.
MAX_MESSAGE = 4_000  # Characters of a message.
MAX_TRACEBACK = 16_000  # The last so many characters of a traceback are logged.

_UNPRINTABLE = re.compile(r"[^ -~]")
_UNSAFE_IN_ID = re.compile(r"[^A-Za-z0-9._:@/+=-]")
_BARE = re.compile(r"[^\s\"'=\\]+")  # A value that needs no quotes.
_INDENT = "\n    "

log = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="-")


def printable(text: str, limit: int) -> str:
    """The first ``limit`` characters of text from outside, on one line and in printable ASCII, so
    that it can neither look like another record nor control a terminal."""
    shown = _UNPRINTABLE.sub("?", text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def safe_id(text: str) -> str:
    """A request's id as it is logged and sent on: without unsafe characters."""
    return _UNSAFE_IN_ID.sub("", text[: 2 * MAX_ID])[:MAX_ID]


# ---- lines


class Formatter(logging.Formatter):
    """Formats every record, including those of libraries. ``form``: the value of
    ``--log-format``."""

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
            "request_id": identity,
            "message": message,
            **_trace_ids(),
            **fields,
        }
        return json.dumps({**values, "exception": trace} if trace else values)

    def _traceback(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n".join(filter(None, (trace, record.stack_info)))[-MAX_TRACEBACK:]


def _trace_ids() -> dict[str, str]:
    """The ids of the current span, if there is one."""
    ids = traces.current().ids
    return {} if ids is None else dict(zip(("trace_id", "span_id"), ids, strict=True))


def stamp(seconds: float) -> str:
    """A time in ISO 8601, to the millisecond, with the offset of this machine's zone."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


def _plain(value: Any) -> Any:
    """``value`` as a JSON value: texts and lists cut to their limits, floats to one decimal."""
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
    """``text`` with every line but the first indented, so that only the first looks like a
    record."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _INDENT if c == "\n" else "?" for c in text)


# ---- the event of a request


class Event:
    """The fields and the error of one request, so far."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.error: OpticNerveError | None = None
        self.cause: BaseException | None = None  # The exception behind an unexpected error.
        self._began = time.monotonic()

    def write(
        self,
        logger: logging.Logger,
        level: int,
        message: str,
        *,
        expected: bool = False,
        **first: Any,
    ) -> None:
        """Logs the event: ``first``, the duration, and its fields, without those that are empty.

        A server's error is logged at least as a warning, unless ``expected``; an unexpected error,
        which has a cause, as an error.
        """
        fields = {**first, "ms": (time.monotonic() - self._began) * 1000, **self.fields}
        if self.error is not None:
            error = self.error
            if error.http_status >= 500 and not expected:
                level = max(level, logging.WARNING)
            fields |= {
                "code": error.code or error.type,
                "param": error.param,
                "reason": error.logged,
            }
        level = level if self.cause is None else logging.ERROR
        fields = {name: value for name, value in fields.items() if value not in (None, "", [])}
        logger.log(level, message, exc_info=self.cause, extra={"fields": fields})


_current: ContextVar[Event | None] = ContextVar("event", default=None)


def begin_event(identity: str = "-") -> Event:
    """Begins the event of the request that this task, and the tasks it starts, serve from now
    on."""
    event = Event()
    _current.set(event)
    request_id.set(identity)
    return event


def identify(identity: str) -> None:
    """Sets the id of the current request, if it was not known when the event began."""
    request_id.set(safe_id(identity) or "-")


def note(**fields: Any) -> None:
    """Adds fields to the current request's event, if there is one; None values are left out."""
    event = _current.get()
    if event is not None:
        event.fields.update({name: value for name, value in fields.items() if value is not None})


def append(**fields: Any) -> None:
    """Appends each value to the list field of its name, unless it is in the list already."""
    event = _current.get()
    if event is not None:
        for name, value in fields.items():
            values = event.fields.setdefault(name, [])
            if value not in values:
                values.append(value)


def failed(error: OpticNerveError, cause: BaseException | None = None) -> None:
    """Marks the current request as ended by ``error``. ``cause`` is the unexpected exception behind
    it, which is logged with its traceback even outside of a request."""
    event = _current.get()
    if event is not None and event.error is not error:
        event.error, event.cause = error, cause
    elif event is None and cause is not None:
        log.error("unexpected error", exc_info=cause)


# ---- a process


def _is_news(record: logging.LogRecord) -> bool:
    """False for the traceback that grpcio's ``_handle_exceptions`` logs when a call is cancelled
    before its handler has begun: callers may leave at any time, and nothing has failed."""
    error = record.exc_info[1] if record.exc_info else None
    return not (
        isinstance(error, asyncio.CancelledError)
        and record.getMessage().startswith("Exception not handled by _handle_exceptions")
    )


def configure(level: str, form: str = "text") -> None:
    """Configures the process's root logger; a command's main calls it once. Python's warnings
    become log records too, and with JSON so do uncaught exceptions of the process and its
    threads."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(form))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # HTTP clients log whole URLs, which may hold keys.
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "grpc", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    logging.captureWarnings(True)
    if form == "json":
        sys.excepthook = _unexpected
        threading.excepthook = _unexpected_in_thread
        if os.environ.get("GRPC_VERBOSITY", "ERROR") == "ERROR":
            os.environ["GRPC_VERBOSITY"] = "NONE"  # gRPC's C library cannot log JSON.


def _form() -> str:
    """The ``form`` that this process's logs were configured with."""
    forms = (getattr(handler.formatter, "form", "") for handler in logging.getLogger().handlers)
    return next(filter(None, forms), "text")


def say(text: str) -> None:
    """Prints why a command ends, as plain text or a JSON record."""
    if _form() == "json":
        log.critical(text)
    else:
        print(text, file=sys.stderr)


def relayed(source: str, line: str) -> str:
    """A line that ``source``, a child process, wrote to stderr, as a line of our own log."""
    if _form() == "text":
        return f"{source:<10} | {line}"
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):  # A library wrote it directly to stderr.
        values = {"time": stamp(time.time()), "level": "info", "logger": "stderr", "message": line}
    return json.dumps({"process": source, **values})


def _unexpected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("the process ends by an unexpected error", exc_info=error)


def _unexpected_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        log.error("a thread ends by an unexpected error", exc_info=args.exc_value)
