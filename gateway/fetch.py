"""Reading the bytes of one media item from wherever a request says they are.

Every hop of an HTTP fetch goes through the same steps: one parser (httpx2.URL) for check and
fetch, the name resolved once, every address checked, the connection made to a checked address with
the name kept for Host and TLS, redirects taken by hand. Size and time are capped while reading.
Errors say what to do; they never quote what was fetched, nor an address that a name resolved to.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import socket
import ssl
import stat
import zlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx2

from gateway.dataurl import is_data_url, read_data_url, too_large
from gateway.netguard import in_domains, is_odd_number, is_public
from opticnerve import __version__
from opticnerve.config import GatewayConfig
from opticnerve.errors import InvalidRequest, MediaFetchFailed

Resolve = Callable[[str, int], Awaitable[list[str]]]
Hold = Callable[[int], None]

MAX_URL_CHARS = 16_384
# Names that do not answer hold a thread for many seconds; pictures are read on other threads.
_RESOLVERS = ThreadPoolExecutor(16, thread_name_prefix="resolve")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOST = re.compile(r"[A-Za-z0-9._:-]+")  # No percent signs, so nothing is left to decode.
INFLATED = ("gzip", "deflate")  # Encodings that are undone.
PLAIN = frozenset({"", "identity"})
PIECE_BYTES = 2**18
MAX_MEMBERS = 1000  # Of a gzip body; each costs time, also where it is empty.
_CODING = re.compile(r"[a-z0-9_, -]{0,40}")
_INSTEAD = "send the picture's bytes as a data: URL"


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``, in the system's order. Raises OSError."""
    look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, look_up)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class MediaFetcher:
    """Fetches items by URL. One a gateway; ``close`` it at the end."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        resolve: Resolve = resolve,
        is_allowed: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._resolve = resolve
        self._is_allowed = (lambda _: True) if config.allow_private_media else is_allowed
        self._client = httpx2.AsyncClient(
            trust_env=False,  # No proxy: it would resolve names by itself.
            follow_redirects=False,
            # The fetch has one time cap; an address that does not answer leaves some of it.
            timeout=httpx2.Timeout(None, connect=config.media_timeout_s / 3),
            verify=tls or httpx2.create_ssl_context(),
            # A kept TLS connection would serve another name at the same address unchecked.
            limits=httpx2.Limits(max_keepalive_connections=0),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # None is kept or sent.
            headers={
                "User-Agent": f"opticnerve/{__version__}",
                "Accept": "image/*,*/*;q=0.8",
                "Accept-Encoding": "identity",
            },
        )

    async def close(self) -> None:
        await self._client.aclose()

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
        target = _parse(url, param)
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
        response = await self._open(target, addresses, first, param)
        try:
            if response.status_code in _REDIRECTS and "location" in response.headers:
                return _redirected(target, response.headers["location"], first, param)
            if response.status_code != 200:
                raise self._failed(f"was answered with {response.status_code}", first, param)
            return await self._read(response, first, param, hold)
        except httpx2.HTTPError as error:
            raise self._failed("broke off", first, param) from error
        finally:
            await response.aclose()

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
        self, target: httpx2.URL, addresses: list[str], first: str, param: str | None
    ) -> httpx2.Response:
        """A response whose body is unread, from the first address that takes a connection."""
        cause: httpx2.HTTPError | None = None
        for address in addresses:
            request = self._client.build_request(
                "GET",
                target.copy_with(host=address.partition("%")[0], fragment=None),
                headers={"Host": target.netloc.decode("ascii")},
                extensions={"sni_hostname": _host(target)},
            )
            try:
                return await self._client.send(request, stream=True)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                cause = error
            except httpx2.HTTPError as error:
                raise self._failed("broke off", first, param) from error
        raise self._failed("could not connect", first, param) from cause

    async def _read(
        self, response: httpx2.Response, first: str, param: str | None, hold: Hold
    ) -> bytes:
        """The body, with its encoding undone. The limit holds for it as it is sent and as it is."""
        limit = self._config.max_media_bytes
        coding = _coding(response.headers.get("content-encoding", ""))
        if coding not in ("", *INFLATED):
            read = " and ".join(INFLATED)
            what = f"got bytes in the encoding {coding}, unasked, and only {read} are read"
            raise self._failed(what, first, param)
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit:
            raise too_large(limit, param)
        decoder = _Decoder(coding)
        body, received = bytearray(), 0
        try:
            async for chunk in response.aiter_raw():
                received += len(chunk)
                if received > limit:
                    raise too_large(limit, param)
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


class _Decoder:
    """Undoes gzip, of one member or several, and deflate, with zlib's frame or without. Piece by
    piece: a few bytes that stand for gigabytes are never more than one piece in memory."""

    def __init__(self, coding: str) -> None:
        """``coding``: one of INFLATED, or "" for bytes that are sent as they are."""
        self._coding = coding
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)  # Either frame, told by its head.
        self._head = b""
        self._members = 1

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """What ``chunk`` adds, PIECE_BYTES at most at a time where it is decoded. Raises
        zlib.error."""
        if not self._coding:
            yield chunk
            return
        if len(self._head) < 2:  # Which tell whether deflate has a frame.
            chunk = self._head = self._head + chunk
            if len(chunk) < 2:
                return
            if self._coding == "deflate" and not _is_framed(chunk):
                self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
            self._head = chunk[:2]
        piece = b""
        while chunk or len(piece) == PIECE_BYTES:  # Of a full piece, zlib may hold some more.
            if self._zlib.eof:
                chunk = chunk.lstrip(b"\0")  # Padding.
                if not chunk:
                    return
                self._members += 1
                if self._members > MAX_MEMBERS:
                    raise zlib.error("too many members")
                self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)  # The next member.
            piece = self._zlib.decompress(chunk, PIECE_BYTES)
            yield piece
            chunk = self._zlib.unconsumed_tail or self._zlib.unused_data

    def check_end(self) -> None:
        """Raises zlib.error where more was to come. Nothing at all is whole."""
        if self._head and not self._zlib.eof:
            raise zlib.error("cut short")


def _is_framed(chunk: bytes) -> bool:
    """Whether the first two bytes are zlib's frame: its method, and their sum. One of 31 streams
    without a frame has the sum by chance; none begins with the method, which would be a stored
    block with a padding that is not zero."""
    return chunk[0] & 15 == 8 and int.from_bytes(chunk[:2]) % 31 == 0


def _coding(header: str) -> str:
    """The Content-Encoding without what says nothing: "" for bytes that are sent as they are."""
    names = [name.strip().lower() for name in header.split(",")]
    coding = ", ".join({"x-gzip": "gzip"}.get(name, name) for name in names if name not in PLAIN)
    return coding if _CODING.fullmatch(coding) else "unknown"


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
