"""Certificates, private keys and authorities in PEM files, which are read again when they change.

Whoever renews them writes one file after the other: until certificate and key belong together, the
ones before stay in use.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

from opticnerve.errors import ConfigError

MAX_BYTES = 2**20  # Of each file.

log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]  # Of each file: when written, which one, how long.


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files held at one time; None for a file that was not named."""

    certificate: bytes | None
    key: bytes | None = field(repr=False)
    authority: bytes | None


class PemFiles:
    """A certificate with its chain, its private key, and the authorities that others are checked
    by. May be used by several threads."""

    def __init__(
        self,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        authority: str | Path | None = None,
    ) -> None:
        """Raises ConfigError for a file that cannot be read or used."""
        if (certificate is None) != (key is None):
            raise ConfigError("a certificate and its key are two files, and both are needed")
        self._paths = tuple(_path(each) for each in (certificate, key, authority))
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._pem = self._read()

    def current(self) -> Pem:
        """The newest contents that could be used; another object only when they changed."""
        with self._lock:
            try:
                stamp = self._look()
                if stamp != self._stamp:
                    self._stamp = stamp
                    self._pem = self._read()
                    log.info("read again: %s", ", ".join(filter(None, self._paths)))
            except ConfigError as error:
                log.warning("the certificates read before stay in use: %s", error.message)
            return self._pem

    def _look(self) -> _Stamp:
        """Which files there are now. Missing ones count as changed, and fail when they are read."""
        return tuple(_stamp(path) for path in self._paths if path is not None)

    def _read(self) -> Pem:
        certificate, key, authority = self._paths
        pem = Pem(*(None if path is None else _contents(path) for path in self._paths))
        if certificate is not None:
            _check_pair(certificate, key)
        if pem.authority is not None:
            _check_authority(authority, pem.authority)
        return pem


def _path(given: str | Path | None) -> str | None:
    return None if given is None else os.path.expanduser(given)


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_ino, found.st_size)


def _contents(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES} bytes")
    return data


def _check_pair(certificate: str, key: str | None) -> None:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Without a password it would ask for one at a terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} are not a certificate in PEM and its private key without a "
            "passphrase"
        ) from error


def _check_authority(path: str | None, data: bytes) -> None:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=data.decode("utf-8", "replace"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no certificates in PEM") from error
