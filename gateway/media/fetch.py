"""Fetches the bytes of one media item by its URL.

Each hop of an HTTP fetch, redirects included, takes the same steps. One parser (httpx2.URL) reads
the URL for both check and fetch; its name is resolved once; every address is checked; then a
checked address is connected to, while Host and TLS keep the name. Size and time are bounded while
reading. Errors quote neither fetched bytes nor resolved addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpcore2
import httpx2

from gateway.edge.admission import SharedCapacity
from gateway.edge.limits import (
    EXTRA_MEDIA_BYTES,
    MAX_FETCHES,
    MAX_FETCHES_PER_ADDRESS,
    MAX_URL_CHARACTERS,
)
from gateway.edge.threads import off_loop_above
from gateway.media.dataurl import is_data_url, read_data_url, too_large
from gateway.media.hosts import Resolver, in_domains, is_public, is_unusual_ipv4
from gateway.media.response_body import header, read_body
from gateway.media.transport import MediaNetwork, MediaStream, UnreadableAnswer
from opticnerve import __version__
from opticnerve.config import GatewayConfig
from opticnerve.errors import InvalidRequest, MediaFetchFailed

Resolve = Callable[[str, int], Awaitable[list[str]]]
Hold = Callable[[int], None]

OFF_LOOP_DATA = 2**13  # Characters of a data: URL; longer ones are decoded in a thread.
OFF_LOOP_URL = 2**11  # Characters of another URL; longer ones take milliseconds to parse.
_HEADERS = (
    (b"User-Agent", f"opticnerve/{__version__}".encode()),
    (b"Accept", b"image/*,*/*;q=0.8"),
    (b"Accept-Encoding", b"identity"),
    (b"Connection", b"close"),
)
_FAULTS = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOST = re.compile(r"[A-Za-z0-9._:-]+")  # No percent signs, so nothing is decoded later.
_INSTEAD = "send the picture's bytes as a data: URL"


@dataclass(frozen=True, slots=True)
class _Fetch:
    """One fetch over HTTP, redirects included. ``host``: the first one, for error messages."""

    host: str
    param: str | None
    hold: Hold

    def failed(self, what: str) -> MediaFetchFailed:
        return MediaFetchFailed(
            f"the fetch from {self.host} {what}; check the URL, or {_INSTEAD}", param=self.param
        )

    def broken(self, error: Exception) -> MediaFetchFailed:
        """The error for an answer that could not be read completely."""
        return self.failed(str(error) if isinstance(error, UnreadableAnswer) else "broke off")

    def redirect(self, target: httpx2.URL, location: str) -> httpx2.URL:
        try:
            return _parse(str(target.join(location)), self.param)
        except (InvalidRequest, httpx2.InvalidURL, UnicodeError, ValueError) as error:
            raise MediaFetchFailed(
                f"the fetch from {self.host} was redirected to a URL that is not fetched; "
                f"{_INSTEAD}",
                param=self.param,
            ) from error


class MediaFetcher:
    """Fetches items by URL; one per gateway."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        resolve: Resolve | None = None,
        is_allowed: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._resolve = resolve or Resolver()
        self._is_allowed = (lambda _: True) if config.allow_private_media else is_allowed
        self._tls = tls or httpx2.create_ssl_context()
        # An encoded body can be larger than the picture itself; TLS adds little.
        self._network = MediaNetwork(2 * config.max_media_bytes + EXTRA_MEDIA_BYTES)
        self._slots = SharedCapacity("fetches", MAX_FETCHES, MAX_FETCHES_PER_ADDRESS)

    async def fetch(
        self, url: str, *, param: str | None = None, hold: Hold = lambda size: None
    ) -> bytes:
        """The bytes at ``url`` (data:, http:, https:, file:), at most ``max_media_bytes``.

        ``hold`` is called with the number of bytes of each piece that arrives. ``param``: the
        request's field, for errors. Raises InvalidRequest for a URL that is not allowed,
        MediaFetchFailed for one that could not be read, PayloadTooLarge, and the errors of
        ``hold``.
        """
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return await self._fetch_remote(url, param, hold)
        if is_data_url(url):
            limit = self._config.max_media_bytes
            data = await off_loop_above(OFF_LOOP_DATA, len(url), read_data_url, url, limit, param)
        elif scheme == "file":
            data = await asyncio.to_thread(self._read_file, url, param)
        else:
            raise InvalidRequest(
                "a media URL must begin with data:, https:, http: or file:", param=param
            )
        hold(len(data))
        return data

    # ---- http and https

    async def _fetch_remote(self, url: str, param: str | None, hold: Hold) -> bytes:
        config = self._config
        if not config.allow_remote_media:
            raise InvalidRequest(
                f"this server fetches no URLs; {_INSTEAD}", param=param, code="remote_media_off"
            )
        target = await off_loop_above(OFF_LOOP_URL, len(url), _parse, url, param)
        fetch = _Fetch(_host(target)[:100], param, hold)
        try:
            async with asyncio.timeout(config.media_timeout_s):
                for _ in range(config.media_redirects + 1):
                    answer = await self._hop(target, fetch)
                    if isinstance(answer, bytes):
                        return answer
                    target = answer
        except TimeoutError as error:
            raise fetch.failed(f"took longer than {config.media_timeout_s:g} seconds") from error
        raise fetch.failed(f"was redirected more than {config.media_redirects} times")

    async def _hop(self, target: httpx2.URL, fetch: _Fetch) -> bytes | httpx2.URL:
        """The body, or the URL of a redirect."""
        addresses = await self._addresses(target, fetch)
        async with contextlib.AsyncExitStack() as connections:
            response = await self._open(target, addresses, connections, fetch)
            location = header(response, b"location")
            if response.status in _REDIRECTS and location:
                return fetch.redirect(target, location)
            if response.status != 200:
                raise fetch.failed(f"was answered with {response.status}")
            try:
                limit = self._config.max_media_bytes
                return await read_body(response, limit, fetch.param, fetch.hold)
            except _FAULTS as error:
                raise fetch.broken(error) from error

    async def _addresses(self, target: httpx2.URL, fetch: _Fetch) -> list[str]:
        """The addresses of ``target``. Raises InvalidRequest unless all of them are allowed."""
        host, param, domains = _host(target), fetch.param, self._config.allowed_media_domains
        if domains and not in_domains(host, domains):
            raise InvalidRequest(
                f"media are not fetched from this host; {_INSTEAD}",
                param=param,
                code="media_domain_not_allowed",
            )
        if is_unusual_ipv4(host):
            raise InvalidRequest("write the URL's address in dotted decimal form", param=param)
        try:
            addresses = await self._resolve(host, _port(target))
        except TimeoutError as error:
            raise fetch.failed("got no answer for the host's name") from error
        except (OSError, UnicodeError) as error:
            raise fetch.failed("found no such host") from error
        if not addresses:
            raise fetch.failed("found no such host")
        if not all(self._is_allowed(address) for address in addresses):
            raise InvalidRequest(
                f"the URL leads to an address that is not public; {_INSTEAD}",
                param=param,
                code="media_address_not_allowed",
            )
        return addresses

    async def _open(
        self,
        target: httpx2.URL,
        addresses: list[str],
        connections: contextlib.AsyncExitStack,
        fetch: _Fetch,
    ) -> httpcore2.Response:
        """The response of the first address that accepts a connection, its body unread;
        ``connections`` closes the connection."""
        cause: Exception | None = None
        for address in addresses:
            try:
                return await connections.enter_async_context(self._request(target, address))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                cause = error
            except _FAULTS as error:
                raise fetch.broken(error) from error
        raise fetch.failed("could not connect") from cause

    @contextlib.asynccontextmanager
    async def _request(self, target: httpx2.URL, address: str) -> AsyncIterator[httpcore2.Response]:
        """The answer of the server at ``address``, over a new connection: a reused one could serve
        another name at the same address without a check."""
        url = httpcore2.URL(
            scheme=target.raw_scheme,
            host=address.partition("%")[0].encode("ascii"),
            port=_port(target),
            target=target.raw_path,
        )
        # A third of the whole fetch's timeout, so that other addresses can be tried.
        extensions = {
            "timeout": {"connect": self._config.media_timeout_s / 3},
            "sni_hostname": _host(target),
        }
        request = httpcore2.Request(
            "GET", url, headers=[(b"Host", target.netloc), *_HEADERS], extensions=extensions
        )
        await self._slots.acquire(address)
        try:
            connection = httpcore2.AsyncHTTPConnection(
                url.origin, ssl_context=self._tls, network_backend=self._network
            )
            async with contextlib.aclosing(connection):
                response = await connection.handle_async_request(request)
                stream = response.extensions["network_stream"]
                if isinstance(stream, MediaStream):  # False for other protocols.
                    stream.head_read = True
                yield response
        finally:
            self._slots.release(address)

    # ---- file

    def _read_file(self, url: str, param: str | None) -> bytes:
        """A regular file under the allowed root, links resolved. A missing file and one outside the
        root give the same error, so that it reveals nothing."""
        root = self._config.allowed_media_root
        if root is None:
            raise InvalidRequest(
                f"this server reads no file: URLs; {_INSTEAD}", param=param, code="file_media_off"
            )
        try:
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise ValueError("a file URL of another host")
            path = Path(unquote(parts.path)).resolve(strict=True)
            path.relative_to(Path(root).resolve(strict=True))
            return self._read_regular(path, param)
        except (OSError, ValueError, RuntimeError) as error:
            raise MediaFetchFailed(
                "there is no such readable file under the allowed media directory", param=param
            ) from error

    def _read_regular(self, path: Path, param: str | None) -> bytes:
        limit = self._config.max_media_bytes
        # Non-blocking: if the file has been replaced by a pipe, this thread must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise too_large(limit, param)
        return data


def _parse(url: str, param: str | None) -> httpx2.URL:
    """A URL with a host and without credentials. Raises InvalidRequest."""
    if len(url) > MAX_URL_CHARACTERS:
        raise InvalidRequest(
            f"the URL is longer than {MAX_URL_CHARACTERS} characters; {_INSTEAD}", param=param
        )
    try:
        target = httpx2.URL(url)
        usable = (
            target.scheme in ("http", "https")
            and _HOST.fullmatch(_host(target)) is not None
            and 0 < _port(target) < 65536
        )
    except (httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise InvalidRequest("the URL is malformed", param=param) from error
    if not usable:
        raise InvalidRequest("the URL is malformed: it needs https:// and a host", param=param)
    if target.userinfo:
        raise InvalidRequest("a media URL must not carry a user name or password", param=param)
    return target


def _host(target: httpx2.URL) -> str:
    """The host in ASCII: international names in their encoded form, IPv6 without brackets."""
    return target.raw_host.decode("ascii")


def _port(target: httpx2.URL) -> int:
    return target.port if target.port is not None else (443 if target.scheme == "https" else 80)
