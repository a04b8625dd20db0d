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
_END = "-----END CERTIFICATE-----"
_DATE_FAULTS = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED.

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

    def server_context(self) -> ssl.SSLContext:
        """A server's side of TLS, which with an authority asks for clients' certificates. Raises
        ConfigError if the files have changed since, and not yet all of them."""
        certificate, key, _ = self._paths
        assert certificate is not None  # A server has its own.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load_pair(context, certificate, key)
        if self._pem.authority is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=_text(self._pem.authority))
        return context

    def client_context(self) -> ssl.SSLContext:
        """A client's side of TLS, which without an authority trusts those of the system, or of
        SSL_CERT_FILE. Raises ConfigError."""
        certificate, key, _ = self._paths
        authority = self._pem.authority
        context = ssl.create_default_context(cadata=None if authority is None else _text(authority))
        if certificate is not None:
            _load_pair(context, certificate, key)
        return context

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


def _text(pem: bytes) -> str:
    """As ``ssl`` takes it; what is not ASCII is comment."""
    return pem.decode("utf-8", "replace")


def _load_pair(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    try:
        # Without a password it would ask for one at a terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} are not a certificate in PEM and its private key without a "
            "passphrase"
        ) from error


def _check_pair(certificate: str, key: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load_pair(context, certificate, key)
    _check_dates(certificate, context)


def context_trusting(certificate: str | Path) -> ssl.SSLContext:
    """A client's side of TLS that trusts one certificate alone, the first of a PEM file, for
    whatever host: of a server that the client itself has started. Raises ConfigError."""
    path = os.path.expanduser(certificate)
    first = _text(_contents(path)).partition(_END)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # Nobody else need have signed it.
    try:
        context.load_verify_locations(cadata="".join(first[:2]))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no certificate in PEM") from error
    return context


def _check_dates(certificate: str, server: ssl.SSLContext) -> None:
    """Warns of a certificate that others refuse because of its dates, as a handshake in memory
    shows; Python's ``ssl`` cannot read a certificate of one's own."""
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context_trusting(certificate).wrap_bio(one, other)
    ends = (client, server.wrap_bio(other, one, server_side=True), client)
    for end in ends:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _DATE_FAULTS:
                log.warning("%s: %s; others refuse it", certificate, error.verify_message)
            return


def _check_authority(path: str | None, data: bytes) -> None:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=_text(data))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no certificates in PEM") from error
