"""Web pages kept from a gateway that asks for no key because it listens on this machine alone.

A page that somebody opens here can make the browser send requests to loopback addresses, under a
name of its own (DNS rebinding) or across origins. Programs name the host as they call it and send
no Origin.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from opticnerve import addresses
from opticnerve.errors import Forbidden, UnsupportedMediaType
from opticnerve.telemetry.logs import printable

ANY = "*"
MAX_SHOWN = 80  # Characters of a header in messages.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::[0-9]*)?")
_FROM_BROWSERS = ("origin", "sec-fetch-site", "sec-fetch-mode")


class PageGuard:
    """Passes requests for this machine by its own names, or by one of ``hosts``, that come from no
    page, a page of this server, or one of ``origins``. ``*`` in either is any."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self.app = app
        self.hosts = {host.strip("[]").lower() for host in hosts}
        self.origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope["method"], Headers(scope=scope))
        await self.app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        """Raises Forbidden and UnsupportedMediaType."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if host and not self._is_ours(host):
            raise Forbidden(
                f"this server has no keys and is for this machine alone, and the request is for "
                f"the host {printable(host, MAX_SHOWN)!r}; call it as localhost, or see "
                "--allowed-hosts and --api-key-file",
                code="host_not_allowed",
            )
        if origin is not None and not self._is_allowed(origin, host):
            raise Forbidden(
                f"this server has no keys and is for this machine alone, and the request is from "
                f"a page of {printable(origin, MAX_SHOWN)!r}; see --cors-origins and "
                "--api-key-file",
                code="origin_not_allowed",
            )
        # What a page can send without asking first has no type or another one.
        from_browser = any(name in headers for name in _FROM_BROWSERS)
        if method == "POST" and from_browser and not headers.get("content-type", "").strip():
            raise UnsupportedMediaType("the body has no type; send JSON as application/json")

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        name = found[1].strip("[]").rstrip(".") if found else ""
        return ANY in self.hosts or addresses.is_loopback(name) or name in self.hosts

    def _is_allowed(self, origin: str, host: str) -> bool:
        own = (f"http://{host}", f"https://{host}")
        return origin in self.origins or ANY in self.origins or origin.lower() in own
