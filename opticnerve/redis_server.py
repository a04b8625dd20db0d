"""Shared by all users of a Redis: its URL, its name in logs, and the logging of outages."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from opticnerve.addresses import host_port

# Query options of a URL that redis-py must not get: the store's, the registry's, and one that
# neither of them can use.
OWN_OPTIONS = frozenset({"local", "max_bytes", "namespace", "decode_responses"})
WARN_EVERY_S = 30.0  # Least time between warnings, for a server that comes and goes.

log = logging.getLogger(__name__)


def split_options(url: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """Takes the query options ``names`` out of ``url``: (the remaining URL, these options)."""
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    own = {name: given.pop(name) for name in names if name in given}
    return urlunsplit(parts._replace(query=urlencode(given))), own


def shown(url: str, client: Any) -> str:
    """The parts of the URL that may be logged: scheme, server and database, without user and
    password. ``client``: a redis-py client for it."""
    options = client.connection_pool.connection_kwargs
    scheme = url.split(":", 1)[0]
    if "path" in options:
        return f"{scheme}://{options['path']}"
    address = host_port(options.get("host", "localhost"), options.get("port", 6379))
    return f"{scheme}://{address}/{options.get('db', 0)}"


class Outage:
    """Whether a server fails. Logs each outage once when it begins and once when it ends.
    Thread-safe.

    ``lost`` is the warning, whose ``%s`` becomes the error's class; ``again`` is the message at the
    end.
    """

    def __init__(self, name: str, lost: str, again: str) -> None:
        self.failing = False
        self._name = name
        self._lost = lost
        self._again = again
        self._lock = threading.Lock()  # Guards ``failing`` and those below.
        self._warned_at = -math.inf
        self._warned = False  # Whether the present failure was logged.

    def failed(self, error: Exception) -> None:
        with self._lock:
            now = time.monotonic()
            self.failing = True
            if self._warned or now - self._warned_at < WARN_EVERY_S:
                return
            self._warned, self._warned_at = True, now
        # Only the error's class: its text may contain credentials.
        log.warning("Redis at %s " + self._lost, self._name, type(error).__name__)

    def ended(self) -> None:
        with self._lock:
            told, self._warned, self.failing = self._warned, False, False
        if told:
            log.info("Redis at %s %s", self._name, self._again)
