"""Discovers the addresses of a pool's workers: from the configuration, from DNS names, whose
addresses may change, and from the registry, where workers register themselves.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Protocol, TypeAlias

from opticnerve.registry.entry import Kind
from opticnerve.registry.redis_registry import Registry

log = logging.getLogger(__name__)

RESOLVE_S = 5.0
RESOLVE_AGAIN_S = 1.0  # While a name has no addresses.
REGISTRY_S = 1.0  # Between two looks at the registry.
DNS_SCHEME = "dns:///"

Listing: TypeAlias = Mapping[str, str]
"""Addresses, each with a text from its source that identifies the worker's state there. When the
text changes, the worker is probed at once."""


class AddressSource(Protocol):
    """Where addresses come from."""

    kind: str  # "static", "dns" or "registry".
    name: str  # For messages.

    @property
    def trouble(self) -> str:
        """Why the source does not answer, in words; empty while it does."""
        ...

    def keeps(self, said: str, instance_id: str) -> bool:
        """Whether a worker that is no longer listed is kept while it serves, because the source may
        merely have lost it. ``said``: its last text in a listing. ``instance_id``: the process that
        serves now."""
        ...

    def watch(self) -> AsyncIterator[Listing]:
        """Yields the current listing, again and again; nothing while the source does not answer."""
        ...


def sources_of(
    addresses: Collection[str], registered: AddressSource | None = None
) -> list[AddressSource]:
    """``addresses``: each ``host:port``, or ``dns:///name:port`` for all behind a name.
    ``registered``: the workers of the registry, if there is one."""
    names = [each for each in addresses if each.startswith(DNS_SCHEME)]
    static = [each for each in addresses if each not in names]
    sources: list[AddressSource] = [DnsName(name.removeprefix(DNS_SCHEME)) for name in names]
    if static:
        sources.insert(0, StaticAddresses(static))
    return sources if registered is None else [*sources, registered]


class StaticAddresses:
    """Addresses that were given."""

    kind = name = "static"
    trouble = ""

    def __init__(self, addresses: Collection[str]) -> None:
        self._addresses = addresses

    def keeps(self, said: str, instance_id: str) -> bool:
        return False

    async def watch(self) -> AsyncIterator[Listing]:
        yield dict.fromkeys(self._addresses, "")


class DnsName:
    """The addresses behind ``name:port``, resolved periodically."""

    kind = "dns"

    def __init__(self, host_port: str) -> None:
        self.name = DNS_SCHEME + host_port
        self.trouble = ""
        self._host_port = host_port

    def keeps(self, said: str, instance_id: str) -> bool:
        return False

    async def watch(self) -> AsyncIterator[Listing]:
        while True:
            found = await resolve(self._host_port)
            trouble = f"{self.name} is not resolved" if found is None else ""
            if trouble and not self.trouble:
                log.warning("%s; its workers stay as they were", trouble)
            self.trouble = trouble
            if found is not None:
                yield dict.fromkeys(found, "")
            await asyncio.sleep(RESOLVE_S if found else RESOLVE_AGAIN_S)


class RegisteredWorkers:
    """The workers of a kind that the registry knows."""

    kind = "registry"

    def __init__(self, registry: Registry, worker: Kind) -> None:
        self.name = f"registry {registry.name}, namespace {registry.namespace}"
        self._registry = registry
        self._worker = worker

    @property
    def trouble(self) -> str:
        return "" if self._registry.reachable else "the registry does not answer"

    def keeps(self, said: str, instance_id: str) -> bool:
        return instance_id in said.split()

    async def watch(self) -> AsyncIterator[Listing]:
        while True:
            entries = await self._registry.entries(self._worker)
            if entries is not None:
                # A restarted worker may have two entries at one address for a while.
                said: dict[str, str] = {}
                for entry in sorted(entries, key=lambda entry: entry.instance_id):
                    before = said.get(entry.address, "")
                    said[entry.address] = f"{before} {entry.instance_id} {entry.state}"
                yield said
            await asyncio.sleep(REGISTRY_S)


async def resolve(name: str) -> set[str] | None:
    """Every host:port behind ``name:port``; None when the resolver does not answer."""
    host, _, port = name.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )
    except (OSError, ValueError) as error:
        log.debug("%s: %s", name, error)
        return None
    hosts = {str(entry[4][0]) for entry in found}
    return {f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts}


def same_family(addresses: set[str]) -> list[str]:
    """The IPv6 or the IPv4 addresses, whichever are more: one machine, such as localhost, often has
    one of each."""
    six = {each for each in addresses if each.startswith("[")}
    four = addresses - six
    return sorted(six if len(six) >= len(four) else four)
