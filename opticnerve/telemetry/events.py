"""The one line that a request leaves in the log of each process that touched it.

Whoever serves the request adds what is worth knowing, at whatever depth (``note``, ``also``,
``failed``); whoever surrounds it (``gateway.edge.middleware``, ``opticnerve.rpc.calls``) begins the
event and writes it at the end, however that comes.
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
    """What is known so far of one request in this process."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.error: OpticNerveError | None = None
        self.cause: BaseException | None = None  # Of an error that nobody expected.
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
        """Logs the event with its fields after ``first``; empty ones are left out.

        An error that is the service's raises ``level`` to a warning, unless it is ``expected``; a
        cause raises it to an error.
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
    """The event of the request that this task, and those that it starts, serve from now on."""
    event = Event()
    _current.set(event)
    logs.request_id.set(identity)
    return event


def identify(identity: str) -> None:
    """The id of the request under way, where it is known only now."""
    logs.request_id.set(logs.safe_id(identity) or "-")


def note(**fields: Any) -> None:
    """Adds to the line of the request under way, if there is one; None is left out."""
    event = _current.get()
    if event is not None:
        event.fields.update({name: value for name, value in fields.items() if value is not None})


def also(**fields: Any) -> None:
    """Adds each value to the list under its name, unless it is there."""
    event = _current.get()
    if event is not None:
        for name, value in fields.items():
            values = event.fields.setdefault(name, [])
            if value not in values:
                values.append(value)


def failed(error: OpticNerveError, cause: BaseException | None = None) -> None:
    """The request under way ends with ``error``. ``cause``, which nobody expected, is logged with
    its traceback, even where no request is under way."""
    event = _current.get()
    if event is not None and event.error is not error:
        event.error, event.cause = error, cause
    elif event is None and cause is not None:
        log.error("unexpected error", exc_info=cause)
