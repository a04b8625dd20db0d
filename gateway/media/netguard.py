"""Which addresses the gateway may fetch from: public unicast ones, judged by what a packet would
reach. Tunnelled forms are judged by the IPv4 address inside."""

from __future__ import annotations

import ipaddress
import re

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# What ipaddress calls global (in some Python release) and a fetch must not reach all the same.
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


def is_public(address: str) -> bool:
    """Whether a connection to this literal address stays out of private, loopback, link-local,
    metadata, multicast and reserved space."""
    ip: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _inner(ip)
        if inner is not None:
            return is_public(str(inner))
    if any(ip.version == network.version and ip in network for network in _REFUSED):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _inner(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to ``ip`` end up at, of mapped, 6to4 and NAT64 forms."""
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip in _SIX_TO_FOUR:
        return ip.sixtofour
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return None


def is_odd_number(host: str) -> bool:
    """Whether a host is an IPv4 address in any but dotted decimal form: 2130706433, 0x7f.1, 0177.1.

    Resolvers differ in how they read these; nobody writes them for an honest reason.
    """
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
