"""Hosts and ports: how they are written, and whether they can be had."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
from collections.abc import Iterable

from opticnerve.errors import ConfigError

BACKLOG = 2048
_BRACKETS = str.maketrans("", "", "[]")
LOOPBACK = ("localhost", "127.0.0.0/8", "::1")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


def join(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check(text: str) -> str:
    """``text``, if it is a HOST:PORT that can be called. Raises ValueError."""
    match = _ADDRESS.fullmatch(text)
    if not match or not 0 < int(match[2]) < 2**16:
        raise ValueError(f"{text!r} is no HOST:PORT")
    return text


def check_advertised(text: str) -> str:
    """``text``, if it is a HOST:PORT that others can call. Raises ValueError."""
    check(text)
    if is_wildcard(text.rpartition(":")[0]):
        raise ValueError(f"{text!r} stands for every interface, and is no address to call")
    return text


def check_name(text: str) -> str:
    """``text``, if it is HOST:PORT or dns:///NAME:PORT. Raises ValueError."""
    check(text.removeprefix("dns:///"))
    return text


class Hosts:
    """A set of hosts: names, ``*.NAME`` for all below one, IPs and networks such as 10.0.0.0/8.

    A name is one by its spelling alone; nothing is resolved.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        """Raises ValueError for what is none of these."""
        self._names: set[str] = set()
        self._above: list[str] = []  # ".NAME"
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
                self._names.add(_normal(name))
            else:
                self._above.append("." + _normal(name))

    def __contains__(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            name = _normal(host)
            below = any(name.endswith(suffix) for suffix in self._above)
            return bool(_NAME.fullmatch(name)) and (below or name in self._names)
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._networks)


def _normal(name: str) -> str:
    return name.lower().removesuffix(".")


def host_of(address: str) -> str:
    """The host of HOST:PORT."""
    return address.rpartition(":")[0].strip("[]")


def check_host(text: str) -> str:
    """``text``, if it is what ``Hosts`` takes. Raises ValueError."""
    Hosts([text])
    return text


def is_wildcard(host: str) -> bool:
    """Whether ``host`` stands for every interface: nothing that others could call."""
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


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A socket that listens; the caller closes it. Raises ConfigError, which names ``flag``."""
    host = host.strip("[]")
    # With the protocol named, asyncio sets TCP_NODELAY on what is accepted; without, an answer's
    # second packet waits 40 ms for the acknowledgement of its first.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # Now, not later: of two that bound, one is refused here.
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            _refusal(host, port, flag, error), param=flag[2:].replace("-", "_")
        ) from error
    return listener


def _refusal(host: str, port: int, flag: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    taken = getattr(error, "errno", 0) == errno.EADDRINUSE
    host_flag = flag.replace("port", "host")
    hint = f"choose another {flag} (0 takes a free one)" if taken else f"see {host_flag} and {flag}"
    return f"cannot listen on {join(host, port)}: {reason[:1].lower() + reason[1:]}; {hint}"


def check_free(host: str, port: int, flag: str = "--port") -> None:
    """Raises ConfigError where ``bind`` would now; for whoever binds later, after long work."""
    bind(host, port, flag).close()
