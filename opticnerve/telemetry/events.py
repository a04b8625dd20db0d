"""Request events: the one line that each process logs for a request that it served.

The code around a request (``gateway.edge.middleware``, ``opticnerve.rpc.calls``) begins the event,
and writes it when the request ends in any way. Code that serves the request adds fields at any
depth: ``note``, ``append``, ``failed``.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from typing import Any

from opticnerve.errors import OpticNerveError
from opticnerve.telemetry import logs

log = logging.getLogger(__name__)


class Event:
    """The fields and the error of one request, so far."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.error: OpticNerveError | None = None
        self.cause: BaseException | None = None  # Of an unexpected error.
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

        A server's error raises ``level`` to a warning unless it is ``expected``; an unexpected
        error, which has a cause, raises it to an error.
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


def begin(identity: str = "-") -> Event:
    """A new event for the request that this task, with the tasks it starts, serves from now on."""
    event = Event()
    _current.set(event)
    logs.request_id.set(identity)
    return event


def identify(identity: str) -> None:
    """Sets the id of the current request, if it was not known when the event began."""
    logs.request_id.set(logs.safe_id(identity) or "-")


def note(**fields: Any) -> None:
    """Adds fields to the current request's event, if there is one; None is left out."""
    event = _current.get()
    if event is not None:
        event.fields.update({name: value for name, value in fields.items() if value is not None})


def append(**fields: Any) -> None:
    """Adds each value to the list that is the field of its name, unless the list has it."""
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
