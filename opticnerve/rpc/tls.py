"""TLS on gRPC: the credentials of servers, and channels that follow their certificates' files.

A server checks its files at each new connection, a channel at each call. Running calls keep the
connection that they began on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import grpc

from opticnerve.certificates import Pem, PemFiles
from opticnerve.config.shared import CallsConfig, CertificateConfig


class ChannelTls:
    """The authorities that channels trust, and the certificate that they present; shared by all
    channels of a process."""

    def __init__(
        self,
        ca: str | Path,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        server_name: str | None = None,
    ) -> None:
        """``ca``: a file with the authorities that signed the services' certificates.
        ``certificate``, ``key``: files, for services that ask for a certificate. ``server_name``:
        the name that the services' certificates have, if not the host in their addresses. Raises
        ConfigError."""
        self._files = PemFiles(certificate, key, ca)
        self._server_name = server_name

    @classmethod
    def of(cls, calls: CallsConfig, own: CertificateConfig) -> ChannelTls | None:
        """From a service's configuration; None without ``--tls-ca``. Raises ConfigError."""
        if calls.tls_ca is None:
            return None
        return cls(calls.tls_ca, own.tls_certificate, own.tls_key, calls.tls_server_name)

    def current(self) -> Pem:
        """The files' contents; a new object only if they have changed."""
        return self._files.current()

    def connect(self, address: str, options: Sequence[Any], pem: Pem) -> grpc.aio.Channel:
        """A lazily connected channel with these certificates."""
        all_options = [*options, *self._name_option()]
        return grpc.aio.secure_channel(address, _credentials(pem), options=all_options)

    def connect_blocking(self, address: str) -> grpc.Channel:
        """A channel for code without an event loop. It keeps the certificates of now."""
        return grpc.secure_channel(address, _credentials(self.current()), self._name_option())

    def _name_option(self) -> list[tuple[str, str]]:
        return [("grpc.ssl_target_name_override", self._server_name)] if self._server_name else []


def _credentials(pem: Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)


class TlsChannel(grpc.aio.Channel):
    """A channel whose calls use the certificates that the files hold when the call begins. gRPC's
    own channels keep the certificates that they were opened with."""

    def __init__(self, address: str, tls: ChannelTls, options: Sequence[Any]) -> None:
        self._open = partial(tls.connect, address, options)
        self._tls = tls
        self._pem = tls.current()
        self._channel = self._open(self._pem)
        self._running: Counter[grpc.aio.Channel] = Counter()  # Calls by the channel they run on.
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        for channel in {self._channel, *self._running}:
            await channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def unary_unary(self, *method: Any, **kind: Any) -> Any:
        return self._following("unary_unary", method, kind)

    def unary_stream(self, *method: Any, **kind: Any) -> Any:
        return self._following("unary_stream", method, kind)

    def stream_unary(self, *method: Any, **kind: Any) -> Any:
        return self._following("stream_unary", method, kind)

    def stream_stream(self, *method: Any, **kind: Any) -> Any:
        return self._following("stream_stream", method, kind)

    def _following(self, kind: str, method: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A method whose calls run on the newest channel."""

        def call(*args: Any, **kwargs: Any) -> Any:
            channel = self._newest()
            begun = getattr(channel, kind)(*method, **options)(*args, **kwargs)
            self._running[channel] += 1
            begun.add_done_callback(lambda _: self._ended(channel))
            return begun

        return call

    def _newest(self) -> grpc.aio.Channel:
        pem = self._tls.current()
        if pem is not self._pem:
            older, self._channel, self._pem = self._channel, self._open(pem), pem
            if not self._running[older]:
                self._close_soon(older)
        return self._channel

    def _ended(self, channel: grpc.aio.Channel) -> None:
        self._running[channel] -= 1
        if self._running[channel]:
            return
        del self._running[channel]
        if channel is not self._channel:
            self._close_soon(channel)

    def _close_soon(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.create_task(_close(channel))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close(channel: grpc.aio.Channel) -> None:
    await channel.close(None)


def server_credentials(files: PemFiles) -> grpc.ServerCredentials:
    """Credentials with the certificate of ``files``; new connections use the newest. With an
    authority, callers without a certificate that it signed are refused."""
    given = files.current()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """None while nothing has changed."""
        nonlocal given
        newest = files.current()
        if newest is given:
            return None
        given = newest
        return _configuration(newest)

    renew = cast("Callable[[], grpc.ServerCertificateConfiguration]", renewed)  # Or None.
    return grpc.dynamic_ssl_server_credentials(
        _configuration(given), renew, require_client_authentication=given.authority is not None
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None and pem.certificate is not None  # A server has its own.
    return grpc.ssl_server_certificate_configuration(
        [(pem.key, pem.certificate)], root_certificates=pem.authority
    )
