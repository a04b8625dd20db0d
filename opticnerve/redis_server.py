"""What users of a Redis share: its URL, how it is named in logs, and when its failure is told."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from opticnerve.addresses import host_port

# Options of a URL's query that are ours and not redis-py's: of the store, of the registry, or of
# no use to either.
OWN_OPTIONS = frozenset({"local", "max_bytes", "namespace", "decode_responses"})
WARN_EVERY_S = 30.0  # At most so often, for a server that comes and goes.

log = logging.getLogger(__name__)


def split_options(url: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """``url`` without the options of its query called ``names``, and these options."""
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    own = {name: given.pop(name) for name in names if name in given}
    return urlunsplit(parts._replace(query=urlencode(given))), own


def shown(url: str, client: Any) -> str:
    """The loggable parts of the URL: scheme, server and database, no user and no password.
    ``client``: a client of redis-py for it."""
    options = client.connection_pool.connection_kwargs
    scheme = url.split(":", 1)[0]
    if "path" in options:
        return f"{scheme}://{options['path']}"
    address = host_port(options.get("host", "localhost"), options.get("port", 6379))
    return f"{scheme}://{address}/{options.get('db', 0)}"


class Outage:
    """Whether a server fails, told once when it begins to and once when it has ended. Thread-safe.

    ``lost``, with the error's class for its ``%s``, is the warning, ``again`` the message at the
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
