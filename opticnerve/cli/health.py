"""``opticnerve health``: whether a worker or a gateway serves, as a health check for containers.

Such a check runs every few seconds, so little is imported: gRPC for a worker, ``http.client`` for a
gateway. It needs neither a token nor an API key.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

from opticnerve.addresses import check_host_port, gateway_url
from opticnerve.config.command_line import Parser, add_options, argument_type, number_type
from opticnerve.config.options import build, options
from opticnerve.config.shared import CallsConfig, CertificateConfig, client_tls_options
from opticnerve.errors import DeadlineExceeded, OpticNerveError, Unavailable
from opticnerve.telemetry import logs

DESCRIPTION = (
    "Asks a worker or a gateway whether it serves, and says so in one line. Exits 0 if it does, "
    "1 if not."
)
EPILOG = "Examples: opticnerve health 127.0.0.1:7001; opticnerve health http://127.0.0.1:8000"
MAX_ANSWER_BYTES = 2**16
MAX_REASON = 400  # Characters.


def parser() -> Parser:
    made = Parser("health", DESCRIPTION, "ADDRESS [flags]", EPILOG)
    group = made.add_argument_group("Check")
    group.add_argument(
        "address",
        metavar="ADDRESS",
        type=argument_type(_address),
        help="HOST:PORT of an encoder or LLM worker, which is called over TLS if --tls-ca is "
        "given, or the URL of a gateway, with http:// or https://",
    )
    group.add_argument(
        "--live",
        action="store_true",
        help="ask only whether the process answers, ready to serve or not",
    )
    group.add_argument(
        "--timeout",
        type=number_type(float),
        default=3.0,
        metavar="SECONDS",
        help="how long an answer may take (default: 3)",
    )
    names = [item for item in options(CallsConfig) if item.name == "tls_server_name"]
    add_options(made, [*client_tls_options(), *names])
    return made


def _address(text: str) -> str:
    return gateway_url(text) if "://" in text else check_host_port(text)


def main(argv: Sequence[str]) -> int:
    args: argparse.Namespace = parser().parse_args(argv)
    try:
        calls, own = build(CallsConfig, vars(args)), build(CertificateConfig, vars(args))
        kind = ask_gateway if "://" in args.address else ask_worker
        ask = partial(kind, args.address, args.live, args.timeout, calls, own)
        state = within(args.timeout, ask)
    except OpticNerveError as error:
        print(f"{args.address} {error.message}", file=sys.stderr)
        return 1
    print(f"{args.address} is {state}")
    return 0


def within(timeout_s: float, ask: Callable[[], str]) -> str:
    """Returns or raises what ``ask`` does within ``timeout_s``; else raises DeadlineExceeded.

    ``ask`` runs on a daemon thread, because neither resolving a name nor an answer that arrives
    byte by byte has a timeout of its own.
    """
    ended: list[str | OpticNerveError] = []

    def run() -> None:
        try:
            ended.append(ask())
        except OpticNerveError as error:
            ended.append(error)

    thread = threading.Thread(target=run, name="health", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not ended:
        raise DeadlineExceeded(f"does not answer within {timeout_s:g} s")
    if isinstance(ended[0], OpticNerveError):
        raise ended[0]
    return ended[0]


def ask_worker(
    address: str, live: bool, timeout_s: float, calls: CallsConfig, own: CertificateConfig
) -> str:
    """The state of the worker at ``address`` by the standard gRPC health check, over TLS if
    ``calls`` says so. Raises Unavailable if it does not answer or, unless ``live``, does not serve,
    and ConfigError for certificates that cannot be read."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from opticnerve.rpc.tls import ChannelTls

    tls = ChannelTls.of(calls, own)
    with tls.connect_blocking(address) if tls else grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # The stub's type has no methods.
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise Unavailable(f"does not answer: {_why(error)}") from error
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return "serving"
    if live:
        return "live"
    raise Unavailable("is not serving: it is loading, draining or has lost its device")


def _why(error: Any) -> str:
    """The status and details of a failed call."""
    details = logs.printable(error.details() or "", MAX_REASON)
    return f"{error.code().name}: {details}" if details else str(error.code().name)


def ask_gateway(
    url: str, live: bool, timeout_s: float, calls: CallsConfig, own: CertificateConfig
) -> str:
    """The state of the gateway at ``url`` by ``/live`` or ``/ready``. Raises Unavailable if it does
    not answer or is not ready, and ConfigError for certificates that cannot be read."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        if parts.scheme == "https":
            connection = _https_connection(parts, timeout_s, calls, own)
        connection.request("GET", f"{parts.path}/{'live' if live else 'ready'}")
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"does not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
    state = "live" if live else "ready"
    if answer.status == 200:
        return state
    raise Unavailable(f"is not {state}: {_reason(body) or f'status {answer.status}'}")


def _https_connection(
    url: SplitResult, timeout_s: float, calls: CallsConfig, own: CertificateConfig
) -> http.client.HTTPConnection:
    """A connection to a server whose certificate is verified. Raises OSError and ConfigError."""
    from opticnerve.certificates import PemFiles

    host, port = url.hostname or "", url.port or http.client.HTTPS_PORT
    files = PemFiles(own.tls_certificate, own.tls_key, calls.tls_ca)
    connection = http.client.HTTPConnection(host, port)
    connection.sock = files.client_context().wrap_socket(
        socket.create_connection((host, port), timeout_s),
        server_hostname=calls.tls_server_name or host,
    )
    return connection


def _reason(body: bytes) -> str:
    """What ``/ready`` reports as missing; empty if the body is something else, or the gateway hides
    it from callers without an API key."""
    try:
        return logs.printable("; ".join(json.loads(body)["missing"]), MAX_REASON)
    except (ValueError, KeyError, TypeError):
        return ""
