"""The socket that a gateway listens on: bound here, or inherited from a parent that shares it among
several processes."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator

from gateway.edge.auth import Keys
from opticnerve import addresses
from opticnerve.config import GatewayConfig

log = logging.getLogger(__name__)

UNSENT_BYTES = 2**16  # Bytes of an answer that the kernel buffers beyond the client's window.


class Listener(socket.socket):
    """A listening socket with a long accept queue. asyncio would shorten it to the number of
    connections accepted in one turn of the event loop."""

    def listen(self, backlog: int = addresses.BACKLOG) -> None:
        super().listen(addresses.BACKLOG)


@contextlib.contextmanager
def listen(settings: GatewayConfig, keys: Keys) -> Iterator[Listener]:
    """The listening socket: the inherited one if there is one; else bound to --host, or by default
    to loopback if there are no keys.

    Raises ConfigError if the address cannot be bound.
    """
    if settings.listen_fd is not None:
        with Listener(fileno=settings.listen_fd) as inherited:
            yield inherited
        return
    host = settings.listen_host
    with Listener(fileno=addresses.bind(host, settings.port).detach()) as listener:
        listener.setblocking(False)
        # Connections inherit this option. It keeps an answer that its client does not read in this
        # process, not in the kernel, so that the process can detect a stalled client.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        known = keys.required or settings.https.https_client_ca
        if not known and not addresses.is_loopback(host):
            log.warning("listening on %s without API keys; see --api-key-file", host)
        yield listener


def address_of(listener: socket.socket, scheme: str) -> str:
    """The URL at which this machine reaches a listener."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{addresses.host_port(host, port)}"
