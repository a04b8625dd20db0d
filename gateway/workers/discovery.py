"""Discovers the addresses of a pool's workers.

An address is ``host:port``, or ``dns:///name:port`` for all addresses behind a name, which may
change.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator

log = logging.getLogger(__name__)

RESOLVE_S = 5.0
RESOLVE_AGAIN_S = 1.0  # While a name has no addresses.
DNS_SCHEME = "dns:///"


async def watch(name: str) -> AsyncIterator[set[str]]:
    """The addresses behind ``name:port``, resolved periodically while this is iterated. If the
    resolver does not answer, nothing is yielded."""
    while True:
        found = await resolve(name)
        if found is not None:
            yield found
        await asyncio.sleep(RESOLVE_S if found else RESOLVE_AGAIN_S)


async def resolve(name: str) -> set[str] | None:
    """Every host:port behind ``name:port``; None when the resolver does not answer."""
    host, _, port = name.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )
    except (OSError, ValueError) as error:
        log.warning("%s: %s", name, error)
        return None
    hosts = {str(entry[4][0]) for entry in found}
    return {f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts}


def same_family(addresses: set[str]) -> list[str]:
    """The larger set of IPv6 or IPv4 addresses: one machine often has one of each, such as
    localhost."""
    six = {each for each in addresses if each.startswith("[")}
    four = addresses - six
    return sorted(six if len(six) >= len(four) else four)
