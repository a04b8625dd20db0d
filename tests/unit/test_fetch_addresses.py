"""Which addresses are public, by what a packet would reach."""

from __future__ import annotations

import pytest

from gateway.media.hosts import in_domains, is_public, is_unusual_ipv4


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1"),
        *("172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200"),
        *("168.63.129.16", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.9"),
        *("192.88.99.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
        *("2001:db8::1", "100::1", "2001::1", "64:ff9b:1::1", "::7f00:1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"),
        *("2002:7f00:1::", "2002:a00:1::1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe"),
    ],
)
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "1.1.1.1", "93.184.216.34", "172.15.0.1", "172.32.0.1", "100.63.0.1"),
        *("2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"),
    ],
)
def test_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("host", "odd"),
    [
        *[(host, True) for host in ("2130706433", "0x7f.1", "0X7F000001", "127.1", "0177.0.0.1")],
        *[(host, True) for host in ("1.2.3.4.", "a.0x1", "08.8.8.8", "256.1.1.1", "0x")],
        *[(host, False) for host in ("8.8.8.8", "example.com", "1password.com", "a1", "x.1a")],
        *[(host, False) for host in ("::1", "0xample.com", "3com.com", "::ffff:1.2.3.4")],
    ],
)
def test_odd_numbers(host: str, odd: bool) -> None:
    assert is_unusual_ipv4(host) is odd


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *[(host, True) for host in ("good.example", "a.b.good.example", "GOOD.example.")],
        *[(host, False) for host in ("notgood.example", "good.example.evil", "example", "")],
    ],
)
def test_domains(host: str, allowed: bool) -> None:
    assert in_domains(host, ("Good.Example", "", " .other.test ")) is allowed
