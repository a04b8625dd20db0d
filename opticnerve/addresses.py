"""Hosts and ports: how they are written, which hosts they mean, and sockets that listen there."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from opticnerve.errors import ConfigError

BACKLOG = 2048
LOOPBACK = ("localhost", "127.0.0.0/8", "::1")
_BRACKETS = str.maketrans("", "", "[]")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


def host_port(host: str, port: int) -> str:
    """``host:port``, with an IPv6 address in brackets."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of HOST:PORT."""
    return address.rpartition(":")[0].strip("[]")


def check_host_port(text: str) -> str:
    """``text``, if it is a HOST:PORT that can be called. Raises ValueError."""
    match = _HOST_PORT.fullmatch(text)
    if not match or not 0 < int(match[2]) < 2**16:
        raise ValueError(f"{text!r} is no HOST:PORT")
    return text


def check_advertised(text: str) -> str:
    """``text``, if it is a HOST:PORT that other machines can call. Raises ValueError."""
    check_host_port(text)
    if is_wildcard(text.rpartition(":")[0]):
        raise ValueError(f"{text!r} stands for every interface; give an address to call")
    return text


def check_target(text: str) -> str:
    """``text``, if it is HOST:PORT or dns:///NAME:PORT. Raises ValueError."""
    check_host_port(text.removeprefix("dns:///"))
    return text


def gateway_url(text: str) -> str:
    """The base URL of a gateway. ``text`` may lack the scheme, and may end in ``/v1`` or
    ``/v1/chat/completions``. Raises ValueError."""
    wrong = f"{text!r} is no address such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        _ = parts.port  # urlsplit checks the port only when it is read.
    except ValueError as error:
        raise ValueError(wrong) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(wrong)
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path.rstrip('/')}"


def check_host(text: str) -> str:
    """``text``, if it is a pattern that ``Hosts`` takes. Raises ValueError."""
    Hosts([text])
    return text


class Hosts:
    """A set of hosts: names, ``*.NAME`` for all below one, IPs and networks such as 10.0.0.0/8.

    Names are compared as they are written; nothing is resolved.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        """Raises ValueError for a pattern that is none of these."""
        self._names: set[str] = set()
        self._suffixes: list[str] = []  # ".NAME" for each "*.NAME".
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for pattern in patterns:
            self._add(pattern)

    def _add(self, pattern: str) -> None:
        try:
            self._networks.append(ipaddress.ip_network(pattern.translate(_BRACKETS), strict=False))
        except ValueError:
            name = pattern.removeprefix("*.")
            if not _NAME.fullmatch(name):
                raise ValueError(f"{pattern!r} is no host and no network") from None
            if name == pattern:
                self._names.add(_normalize(name))
            else:
                self._suffixes.append("." + _normalize(name))

    def __contains__(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            name = _normalize(host)
            return bool(_NAME.fullmatch(name)) and (
                name in self._names or name.endswith(tuple(self._suffixes))
            )
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._networks)


def _normalize(name: str) -> str:
    return name.lower().removesuffix(".")


def is_wildcard(host: str) -> bool:
    """Whether ``host`` stands for every interface, and so cannot be called."""
    host = host.strip("[]")
    if host == "*":
        return True
    with contextlib.suppress(OSError):
        return socket.inet_aton(host) == bytes(4)  # Short forms too: 0, 0.0, 0x0.
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return (address.ipv4_mapped or address).is_unspecified


def is_loopback(host: str) -> bool:
    """Whether ``host`` is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_elsewhere(url: str) -> bool:
    """Whether the Redis that ``url`` names may be on another machine."""
    parts = urlsplit(url)
    host = parts.hostname or "localhost"  # redis-py's default.
    return parts.scheme in ("redis", "rediss") and not is_loopback(host)


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A listening socket, which the caller closes. Raises ConfigError, which names ``flag``."""
    host = host.strip("[]")
    # asyncio sets TCP_NODELAY on accepted connections only if the protocol is named here; without
    # it the second packet of an answer waits 40 ms for the acknowledgement of the first.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # At once: if two processes have bound the port, one fails here.
    except (OSError, OverflowError) as error:
        listener.close()
        param = flag[2:].replace("-", "_")
        raise ConfigError(_bind_failure(host, port, flag, error), param=param) from error
    return listener


def _bind_failure(host: str, port: int, flag: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    taken = getattr(error, "errno", 0) == errno.EADDRINUSE
    host_flag = flag.replace("port", "host")
    hint = f"choose another {flag} (0 takes a free one)" if taken else f"see {host_flag} and {flag}"
    where, reason = host_port(host, port), reason[:1].lower() + reason[1:]
    return f"cannot listen on {where}: {reason}; {hint}"


def check_free(host: str, port: int, flag: str = "--port") -> None:
    """Raises ConfigError if ``bind`` would fail now; for a process that binds after long work."""
    bind(host, port, flag).close()
