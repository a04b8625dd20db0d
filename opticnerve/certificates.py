"""Certificates, private keys and authorities in PEM files, which are read again when they change.

A renewal writes one file after the other, so the previous contents stay in use until certificate
and key belong together.
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

_Stamp = tuple[tuple[int, int, int], ...]  # For each file: mtime in ns, inode, size.


@dataclass(frozen=True, slots=True)
class Pem:
    """The contents of the files at one time; None for a file that was not named."""

    certificate: bytes | None
    key: bytes | None = field(repr=False)
    authority: bytes | None


class PemFiles:
    """A certificate with its chain, its private key, and the authorities that peers' certificates
    are checked against. Thread-safe."""

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
        """The newest usable contents; a new object only if they have changed."""
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
        """A TLS context for a server; with an authority, clients need a certificate. Raises
        ConfigError while the files are being replaced."""
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
        """A TLS context for a client. Without an authority it trusts those of the system, or of
        SSL_CERT_FILE. Raises ConfigError."""
        certificate, key, _ = self._paths
        authority = self._pem.authority
        context = ssl.create_default_context(cadata=None if authority is None else _text(authority))
        if certificate is not None:
            _load_pair(context, certificate, key)
        return context

    def _look(self) -> _Stamp:
        """The files' stamps now. A missing file counts as changed, and fails when it is read."""
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
    """Text for ``ssl``. Only comments can hold other characters than ASCII."""
    return pem.decode("utf-8", "replace")


def _load_pair(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    try:
        # Without this callback OpenSSL would ask for a passphrase at the terminal.
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
    """A TLS context for a client of a server that it has started itself: it trusts only the first
    certificate of a PEM file, under any host name. Raises ConfigError."""
    path = os.path.expanduser(certificate)
    first = _text(_contents(path)).partition(_END)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # Its issuer need not be known.
    try:
        context.load_verify_locations(cadata="".join(first[:2]))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no certificate in PEM") from error
    return context


def _check_dates(certificate: str, server: ssl.SSLContext) -> None:
    """Warns if peers will refuse the certificate because of its dates. A handshake in memory finds
    out, since Python's ``ssl`` does not show the dates of a certificate file."""
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
                log.warning("%s: %s; peers will refuse it", certificate, error.verify_message)
            return


def _check_authority(path: str | None, data: bytes) -> None:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=_text(data))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no certificates in PEM") from error
