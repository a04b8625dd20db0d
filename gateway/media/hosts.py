"""The hosts of media URLs: which addresses are allowed, and how names are resolved.

An address is allowed if it is public unicast, judged by where a packet would arrive: tunnelled
forms count as the IPv4 address inside.

Names are resolved by the system's resolver, in threads, because only it knows this machine's hosts
file, search domains and name services. It blocks for many seconds if a name server does not answer,
and cannot be cancelled. So a look-up is abandoned after a few seconds, and the name is not tried
again for a while. The number of threads is limited, also per registered domain, since the owner of
one silent name server can make up any number of names. Some threads are reserved for names that
were resolved before.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from gateway.edge.admission import SharedCapacity
from gateway.edge.limits import (
    MAX_KNOWN_LOOKUPS,
    MAX_KNOWN_LOOKUPS_PER_SITE,
    MAX_NEW_LOOKUPS,
    MAX_NEW_LOOKUPS_PER_SITE,
    NAME_TIMEOUT_S,
    SILENT_NAME_S,
)
from opticnerve.lru import LRU

MAX_REMEMBERED = 4096  # Resolved names, and silent names.
# Second-level labels under which many countries register domains.
SHARED_SECOND_LABELS = frozenset({"ac", "co", "com", "edu", "go", "gov", "ne", "net", "or", "org"})

LookUp = Callable[..., list[Any]]

# Networks that no fetch may reach, though ipaddress calls them global in some Python release.
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "100.64.0.0/10",  # Shared address space of carriers; some clouds' metadata too.
        "168.63.129.16/32",  # Azure's host agent.
        "192.0.0.0/24",
        "192.88.99.0/24",  # 6to4 relays.
        "::/96",  # IPv4-compatible, long withdrawn.
        "64:ff9b:1::/48",  # NAT64 within one network.
        "100::/64",
        "2001::/23",  # Teredo among others.
        "fec0::/10",  # Site-local, long withdrawn.
    )
)
_SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NUMERIC_HOST = re.compile(r"(?:.*\.)?(?:0[xX][0-9a-fA-F]*|[0-9]+)\.?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: str) -> bool:
    """Whether this literal address is outside of private, loopback, link-local, metadata, multicast
    and reserved space."""
    ip: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _inner(ip)
        if inner is not None:
            return is_public(str(inner))
    if any(ip.version == network.version and ip in network for network in _REFUSED):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _inner(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to ``ip`` reach, for mapped, 6to4 and NAT64 addresses; else
    None."""
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip in _SIX_TO_FOUR:
        return ip.sixtofour
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def is_unusual_ipv4(host: str) -> bool:
    """Whether a host is an IPv4 address in a form other than dotted decimal, such as 2130706433,
    0x7f.1 or 0177.1, which resolvers read differently."""
    if ":" in host or not _NUMERIC_HOST.fullmatch(host):
        return False
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return True
    return False


def in_domains(host: str, domains: tuple[str, ...]) -> bool:
    """Whether ``host`` is one of ``domains`` or below one of them."""
    host = host.rstrip(".").lower()
    names = (domain.strip().strip(".").lower() for domain in domains)
    return any(host == name or host.endswith("." + name) for name in names if name)


class Resolver:
    """Resolves names; one per gateway. Results are not cached, since they may change."""

    def __init__(self, look_up: LookUp = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._new = SharedCapacity("new names", MAX_NEW_LOOKUPS, MAX_NEW_LOOKUPS_PER_SITE)
        self._known = SharedCapacity("known names", MAX_KNOWN_LOOKUPS, MAX_KNOWN_LOOKUPS_PER_SITE)
        self._running: dict[str, asyncio.Future[list[str] | OSError]] = {}
        self._silent_until: LRU[str, float] = LRU(MAX_REMEMBERED)
        self._resolved: LRU[str, bool] = LRU(MAX_REMEMBERED)

    async def __call__(self, host: str, port: int) -> list[str]:
        """The addresses of ``host``, in the system's order. Raises TimeoutError for a name whose
        server does not answer, and other OSErrors."""
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        name = host.rstrip(".").lower()
        answer = self._running.get(name) or await self._start(name, host, port)
        try:
            async with asyncio.timeout(NAME_TIMEOUT_S):
                found = await asyncio.shield(answer)
        except TimeoutError:
            self._resolved.pop(name)
            self._silent_until[name] = time.monotonic() + SILENT_NAME_S
            raise
        if isinstance(found, OSError):
            raise found
        return found

    async def _start(self, name: str, host: str, port: int) -> asyncio.Future[list[str] | OSError]:
        """Starts a look-up in a thread, once there is a slot for it. Returns its future result."""
        self._check_silence(name)
        slots = self._known if name in self._resolved else self._new
        holder = site(name)
        await slots.acquire(holder)
        try:
            self._check_silence(name)  # Another request may have tried meanwhile.
            if name in self._running:
                slots.release(holder)
                return self._running[name]
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[list[str] | OSError] = loop.create_future()

            def end(found: list[str] | OSError) -> None:
                del self._running[name]
                slots.release(holder)
                if not isinstance(found, OSError):
                    self._resolved[name] = True
                answer.set_result(found)

            def run() -> None:
                found = self._find(host, port)
                with contextlib.suppress(RuntimeError):  # The event loop is closed.
                    loop.call_soon_threadsafe(end, found)

            # A daemon thread: a look-up that hangs does not keep the process alive.
            threading.Thread(target=run, name="resolve", daemon=True).start()
        except (OSError, RuntimeError) as error:
            slots.release(holder)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        self._running[name] = answer
        return answer

    def _find(self, host: str, port: int) -> list[str] | OSError:
        try:
            found = self._look_up(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            return error
        except Exception as error:  # Such as UnicodeError for a malformed name.
            return OSError(str(error))
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def _check_silence(self, name: str) -> None:
        until = self._silent_until.get(name)
        if until is None:
            return
        if time.monotonic() < until:
            raise TimeoutError("the name was not resolved in time, a moment ago")
        self._silent_until.pop(name)


def site(name: str) -> str:
    """The registered domain, roughly: a name's last two labels, or three below names such as
    ``co.uk``."""
    labels = name.split(".")
    shared = len(labels[-1]) == 2 and labels[-2:-1] and labels[-2] in SHARED_SECOND_LABELS
    return ".".join(labels[-3 if shared else -2 :])
