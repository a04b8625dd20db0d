"""Reading the bytes of one media item from wherever a request says they are.

Every hop of an HTTP fetch goes through the same steps: one parser (httpx2.URL) for check and
fetch, the name resolved once, every address checked, the connection made to a checked address with
the name kept for Host and TLS, redirects taken by hand. Size and time are capped while reading.
Errors say what to do; they never quote what was fetched, nor an address that a name resolved to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import stat
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpcore2
import httpx2

from gateway.edge.lanes import off_loop
from gateway.media.dataurl import is_data_url, read_data_url, too_large
from gateway.media.encodings import INFLATED, Decoder, name_of
from gateway.media.netguard import in_domains, is_odd_number, is_public
from gateway.media.places import Places
from gateway.media.resolver import Resolver
from gateway.media.transport import Network, Stream, TooMuch
from opticnerve import __version__
from opticnerve.config import GatewayConfig
from opticnerve.errors import InvalidRequest, MediaFetchFailed

Resolve = Callable[[str, int], Awaitable[list[str]]]
Hold = Callable[[int], None]

MAX_URL_CHARS = 16_384
OFF_LOOP_CHARACTERS = 2048  # Of a URL; a longer one takes milliseconds to parse.
MAX_CONNECTIONS = 192  # To all media servers at once; more wait, within their time.
MAX_TO_ONE_ADDRESS = 64
FREE_CHUNKS = 1024  # Of one body. Each costs time, also where it is a byte.
LEAST_CHUNK_BYTES = 512  # On average, of more than those.
_HEADERS = (
    (b"User-Agent", f"opticnerve/{__version__}".encode()),
    (b"Accept", b"image/*,*/*;q=0.8"),
    (b"Accept-Encoding", b"identity"),
    (b"Connection", b"close"),
)
_FAULTS = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOST = re.compile(r"[A-Za-z0-9._:-]+")  # No percent signs, so nothing is left to decode.
_INSTEAD = "send the picture's bytes as a data: URL"


class MediaFetcher:
    """Fetches items by URL. One a gateway."""

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
        # An encoding can make a picture larger than it is; TLS adds little.
        self._network = Network(2 * config.max_media_bytes + 2**18)
        self._places = Places(MAX_CONNECTIONS, MAX_TO_ONE_ADDRESS)

    async def fetch(
        self, url: str, *, param: str | None = None, hold: Hold = lambda size: None
    ) -> bytes:
        """The bytes at ``url`` (data:, http:, https:, file:), at most ``max_media_bytes``.

        ``hold`` is told of bytes as they come. Raises InvalidRequest for a URL that is not read
        here, MediaFetchFailed for one that could not be, PayloadTooLarge, and what ``hold``
        raises. ``param`` names the request's field in errors.
        """
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return await self._fetch_remote(url, param, hold)
        if is_data_url(url):
            data = read_data_url(url, self._config.max_media_bytes, param)
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
        if not self._config.allow_remote_media:
            raise InvalidRequest(
                f"this server fetches no URLs; {_INSTEAD}", param=param, code="remote_media_off"
            )
        long = len(url) > OFF_LOOP_CHARACTERS
        target = await off_loop(len(url), _parse, url, param) if long else _parse(url, param)
        first = _host(target)[:100]
        try:
            async with asyncio.timeout(self._config.media_timeout_s):
                for _ in range(self._config.media_redirects + 1):
                    answer = await self._hop(target, first, param, hold)
                    if isinstance(answer, bytes):
                        return answer
                    target = answer
        except TimeoutError as error:
            raise self._failed(
                f"took longer than {self._config.media_timeout_s:g} seconds", first, param
            ) from error
        raise self._failed(
            f"was redirected more than {self._config.media_redirects} times", first, param
        )

    async def _hop(
        self, target: httpx2.URL, first: str, param: str | None, hold: Hold
    ) -> bytes | httpx2.URL:
        """The body, or where the server sends us instead."""
        addresses = await self._addresses(target, first, param)
        async with contextlib.AsyncExitStack() as held:
            response = await self._open(target, addresses, held, first, param)
            location = _header(response, b"location")
            if response.status in _REDIRECTS and location:
                return _redirected(target, location, first, param)
            if response.status != 200:
                raise self._failed(f"was answered with {response.status}", first, param)
            try:
                return await self._read(response, first, param, hold)
            except _FAULTS as error:
                raise self._failed(_told(error), first, param) from error

    async def _addresses(self, target: httpx2.URL, first: str, param: str | None) -> list[str]:
        """Where ``target`` may be reached: every one of them checked, or none."""
        host, config = _host(target), self._config
        if config.allowed_media_domains and not in_domains(host, config.allowed_media_domains):
            raise InvalidRequest(
                f"media are not fetched from this host; {_INSTEAD}",
                param=param,
                code="media_domain_not_allowed",
            )
        if is_odd_number(host):
            raise InvalidRequest("write the URL's address in dotted decimal form", param=param)
        try:
            addresses = await self._resolve(host, _port(target))
        except TimeoutError as error:
            raise self._failed("got no answer for the host's name", first, param) from error
        except (OSError, UnicodeError) as error:
            raise self._failed("found no such host", first, param) from error
        if not addresses:
            raise self._failed("found no such host", first, param)
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
        held: contextlib.AsyncExitStack,
        first: str,
        param: str | None,
    ) -> httpcore2.Response:
        """A response whose body is unread, from the first address that takes a connection, which
        ``held`` closes."""
        cause: Exception | None = None
        for address in addresses:
            try:
                return await held.enter_async_context(self._asked(target, address))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                cause = error
            except _FAULTS as error:
                raise self._failed(_told(error), first, param) from error
        raise self._failed("could not connect", first, param) from cause

    @contextlib.asynccontextmanager
    async def _asked(self, target: httpx2.URL, address: str) -> AsyncIterator[httpcore2.Response]:
        """What the server at ``address`` answers, over a connection of its own: one that is kept
        would serve another name at the same address unchecked."""
        url = httpcore2.URL(
            scheme=target.raw_scheme,
            host=address.partition("%")[0].encode("ascii"),
            port=_port(target),
            target=target.raw_path,
        )
        # The fetch has one time cap; an address that does not answer leaves some of it.
        extensions = {
            "timeout": {"connect": self._config.media_timeout_s / 3},
            "sni_hostname": _host(target),
        }
        request = httpcore2.Request(
            "GET", url, headers=[(b"Host", target.netloc), *_HEADERS], extensions=extensions
        )
        await self._places.take(address)
        try:
            connection = httpcore2.AsyncHTTPConnection(
                url.origin, ssl_context=self._tls, network_backend=self._network
            )
            async with contextlib.aclosing(connection):
                response = await connection.handle_async_request(request)
                stream = response.extensions["network_stream"]
                if isinstance(stream, Stream):  # Not one of another protocol.
                    stream.head_read = True
                yield response
        finally:
            self._places.give(address)

    async def _read(
        self, response: httpcore2.Response, first: str, param: str | None, hold: Hold
    ) -> bytes:
        """The body, with its encoding undone. The limit holds for it as it is sent and as it is."""
        limit = self._config.max_media_bytes
        coding = name_of(_header(response, b"content-encoding"))
        if coding not in ("", *INFLATED):
            read = " and ".join(INFLATED)
            what = f"got bytes in the encoding {coding}, unasked, and only {read} are read"
            raise self._failed(what, first, param)
        announced = _header(response, b"content-length")
        if announced.isdecimal() and int(announced[:20]) > limit:
            raise too_large(limit, param)
        decoder = Decoder(coding)
        body, received, chunks = bytearray(), 0, 0
        try:
            async for chunk in response.aiter_stream():
                received += len(chunk)
                chunks += 1
                if received > limit:
                    raise too_large(limit, param)
                if chunks > FREE_CHUNKS + received // LEAST_CHUNK_BYTES:
                    raise TooMuch("was answered in chunks of a few bytes, and far too many")
                for piece in decoder.pieces(chunk):
                    body += piece
                    if len(body) > limit:
                        raise too_large(limit, param)
                    hold(len(piece))
                    await asyncio.sleep(0)  # Many pieces of one chunk keep nobody else waiting.
            decoder.check_end()
        except zlib.error as error:
            what = f"got bytes that are no whole {coding}, which their encoding is said to be"
            raise self._failed(what, first, param) from error
        return bytes(body)

    def _failed(self, what: str, host: str, param: str | None) -> MediaFetchFailed:
        return MediaFetchFailed(
            f"the fetch from {host} {what}; check the URL, or {_INSTEAD}", param=param
        )

    # ---- file

    def _read_file(self, url: str, param: str | None) -> bytes:
        """A regular file under the allowed root, links resolved. What is missing and what is out
        of bounds look the same from outside."""
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
        # Non-blocking: a pipe put in the file's place must not hold this thread.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise too_large(limit, param)
        return data


def _header(response: httpcore2.Response, name: bytes) -> str:
    """All that is said under ``name``; "" where nothing is."""
    values = b", ".join(value for key, value in response.headers if key.lower() == name)
    try:
        return values.decode()
    except UnicodeDecodeError:
        return values.decode("latin-1")


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, TooMuch) else "broke off"


def _parse(url: str, param: str | None) -> httpx2.URL:
    """A URL with a host and without credentials. Raises InvalidRequest."""
    if len(url) > MAX_URL_CHARS:
        raise InvalidRequest(
            f"the URL is longer than {MAX_URL_CHARS} characters; {_INSTEAD}", param=param
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


def _redirected(target: httpx2.URL, location: str, first: str, param: str | None) -> httpx2.URL:
    try:
        return _parse(str(target.join(location)), param)
    except (InvalidRequest, httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise MediaFetchFailed(
            f"the fetch from {first} was redirected to a URL that is not fetched; {_INSTEAD}",
            param=param,
        ) from error


def _host(target: httpx2.URL) -> str:
    """The host in ASCII: international names in their encoded form, IPv6 without brackets."""
    return target.raw_host.decode("ascii")


def _port(target: httpx2.URL) -> int:
    return target.port if target.port is not None else (443 if target.scheme == "https" else 80)
