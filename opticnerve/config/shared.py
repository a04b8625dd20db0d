"""Configuration parts and options that several services share."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from opticnerve import addresses
from opticnerve.config.options import Group, Option, option, options
from opticnerve.errors import ConfigError
from opticnerve.media.plan import DEFAULT_MAX_PASSES, DEFAULT_MAX_PIXELS

log = logging.getLogger(__name__)

_model = partial(option, group=Group.MODEL)
_address = partial(option, group=Group.ADDRESS)
_store = partial(option, group=Group.STORE)
_telemetry = partial(option, group=Group.TELEMETRY)
_tls = partial(option, group=Group.TLS)

REDIS_SCHEMES = ("redis", "rediss", "unix")
REDIS_URLS = tuple(f"{scheme}://" for scheme in REDIS_SCHEMES)
NO_REGISTRY = "none"  # Value of --registry.
MIN_IMAGE_PIXELS = 64 * 64  # The picture that encoders warm up with.
MIN_DECODE_PASSES = 2**20  # The decode cost of an ordinary picture's markers.

DRAIN_HELP = (
    "time for running requests to finish after SIGTERM or Ctrl-C; a second signal ends them"
)
PARENT_HELP = "end when this process, the parent, has ended"
TOKEN_HELP = (
    "file with the token that authorizes calls between the gateway and its workers: one secret for "
    "all, for example from `openssl rand -hex 32`; `up` makes one itself"
)
PASSES_HELP = (
    "decode cost over which a picture is refused: pixels × decoding passes (a progressive JPEG has "
    "about ten)"
)
PIXELS_HELP = "pixels of one picture before it is resized; larger ones are refused"
_picture = partial(option, group=Group.PICTURES)
MAX_IMAGE_PIXELS = partial(_picture, DEFAULT_MAX_PIXELS, PIXELS_HELP, minimum=MIN_IMAGE_PIXELS)
MAX_DECODE_PASSES = partial(_picture, DEFAULT_MAX_PASSES, PASSES_HELP, minimum=MIN_DECODE_PASSES)
MAX_LOGPROBS = partial(option, 20, "largest `top_logprobs` of a request", group=Group.LIMITS)


def read_url(given: str, name: str) -> str:
    """``given``, the value of the option ``name``, if it is a URL; for file:///PATH, the URL in
    that file. Raises ConfigError."""
    if not given.startswith("file:"):
        return given
    path = given.removeprefix("file://")
    if not path.startswith("/"):
        raise ConfigError("file:// takes an absolute path: file:///PATH", param=name)
    try:
        url = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the URL of --{name} from {path}", param=name) from error
    if url.split() != [url] or url.startswith("file:"):
        raise ConfigError(
            f"{path} should hold one URL and nothing else, such as redis://:PASSWORD@HOST/0",
            param=name,
        )
    return url


def check_registry(text: str) -> None:
    """Raises ValueError unless ``text`` is the URL of a Redis, a file:/// URL, or "none"."""
    if text != NO_REGISTRY and not text.startswith((*REDIS_URLS, "file:///")):
        raise ValueError("no registry")


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoint to serve."""

    model: str | None = _model(
        None, "checkpoint directory or hub id; without one, the built-in demo checkpoint"
    )
    revision: str | None = _model(None, "branch, tag or commit on the hub", metavar="NAME")
    download_dir: str | None = _model(None, "directory for checkpoints from the hub", metavar="DIR")


@dataclass(frozen=True)
class ModelConfig(CheckpointConfig):
    """Which checkpoint to serve, and on which device and in which type to compute."""

    dtype: str = _model(
        "auto",
        "type of weights and activations; auto: the checkpoint's, or float32 on a CPU without "
        "arithmetic in that type",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    device: str = _model(
        "auto", "cpu, cuda or cuda:N; auto: CUDA if there is a device", metavar="DEVICE"
    )
    threads: int = _model(
        0,
        "CPU threads for tensor work of one process; 0: all cores, under `up` shared among the "
        "encoders and, once more, among the LLM workers",
    )

    @property
    def num_threads(self) -> int:
        """Threads for tensor work. Idle threads sleep (``cli.commands.wait_briefly``), so no core
        is set aside for the event loop."""
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class CertificateConfig:
    """The certificate that a process presents to its callers, and to the processes that it calls,
    over gRPC."""

    tls_certificate: str | None = _tls(
        None,
        "this process's certificate in PEM, with its chain, which it presents to its callers, and "
        "to workers that ask for one; read again when it changes",
        metavar="FILE",
    )
    tls_key: str | None = _tls(
        None, "private key of --tls-certificate, without a passphrase", metavar="FILE"
    )

    def __post_init__(self) -> None:
        """Raises ConfigError if one is given without the other."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("--tls-certificate and --tls-key go together", param="tls_key")


@dataclass(frozen=True)
class CallsConfig:
    """How a process that calls workers over gRPC verifies their certificates."""

    tls_ca: str | None = _tls(
        None,
        "certificates in PEM of the authorities that signed the workers' certificates; calls to "
        "workers are encrypted if it is given",
        metavar="FILE",
    )
    tls_server_name: str | None = _tls(
        None,
        "name in the workers' certificates, if it is not the host in their addresses",
        metavar="NAME",
    )

    def check_certificate(self, own: CertificateConfig) -> None:
        """Raises ConfigError for other TLS options without ``tls_ca``, which encrypts calls."""
        if self.tls_ca is not None:
            return
        for flag, value in (
            ("--tls-certificate", own.tls_certificate),
            ("--tls-server-name", self.tls_server_name),
        ):
            if value is not None:
                raise ConfigError(
                    f"{flag} needs --tls-ca, without which workers are called unencrypted",
                    param="tls_ca",
                )


CLIENT_TLS_HELP = {
    "tls_ca": "certificates in PEM of the authorities to trust (default: the system's)",
    "tls_certificate": "own certificate in PEM, with its chain, for a server that asks for one",
    "tls_key": "private key of --tls-certificate, without a passphrase",
}


def client_tls_options() -> list[Option]:
    """The options of a command that calls a gateway over HTTPS."""
    return [
        replace(item, spec=replace(item.spec, help=CLIENT_TLS_HELP[item.name]))
        for item in (*options(CallsConfig), *options(CertificateConfig))
        if item.name in CLIENT_TLS_HELP
    ]


@dataclass(frozen=True)
class RpcConfig:
    """Where a worker listens, who may call it, and how it stops."""

    host: str = _address("127.0.0.1", "interface to listen on; 0.0.0.0: every one", metavar="HOST")
    port: int = _address(0, "port to listen on; 0: a free one, which is printed", maximum=65535)
    advertise: str | None = _address(
        None,
        "address at which gateways and other workers reach this one; needed if --host is 0.0.0.0 "
        "and they run on other machines",
        metavar="HOST:PORT",
        expects="HOST:PORT that the other services call, such as 10.0.0.5:7001: one machine's name "
        "or IP and a port from 1 to 65535, no wildcard such as 0.0.0.0",
        check=addresses.check_advertised,
    )
    rpc_token_file: str | None = _address(None, TOKEN_HELP, metavar="FILE")
    certificate: CertificateConfig = CertificateConfig()
    tls_client_ca: str | None = _tls(
        None,
        "certificates in PEM of the authorities that sign callers' certificates: a worker refuses "
        "callers without one, health checks included",
        metavar="FILE",
    )
    insecure: bool = _address(
        False,
        "listen beyond this machine without --rpc-token-file or --tls-client-ca, on a network that "
        "only admits callers that may use this worker",
    )
    reflection: bool = _address(
        False, "serve gRPC reflection, which lets tools like grpcurl list the methods"
    )
    drain_timeout_s: float = _address(15.0, DRAIN_HELP)
    parent_pid: int = _address(0, PARENT_HELP, metavar="PID", hidden=True)

    def __post_init__(self) -> None:
        """Raises ConfigError if anyone on the network could use the worker, unless ``insecure``
        allows it, and for ``tls_client_ca`` without the worker's own certificate."""
        if self.tls_client_ca and not self.certificate.tls_certificate:
            raise ConfigError("--tls-client-ca needs --tls-certificate", param="tls_client_ca")
        if self.knows_callers or self.insecure or addresses.is_loopback(self.host):
            return
        raise ConfigError(
            f"at --host {self.host} anyone who reaches the port could use this worker: give it and "
            "all that call it one --rpc-token-file FILE (`umask 077; openssl rand -hex 32 > FILE`),"
            " certificates (--tls-certificate, --tls-key, --tls-client-ca) or, if the network "
            "keeps others out, --insecure",
            param="rpc_token_file",
        )

    @property
    def knows_callers(self) -> bool:
        """Whether callers have to prove that they may use the worker."""
        return bool(self.rpc_token_file or self.tls_client_ca)


@dataclass(frozen=True)
class RegistryConfig:
    """Where embeddings are stored, and where workers are found."""

    store: str = _store(
        "shm://",
        "shm://[DIR][?capacity=SIZE] (one machine), redis:// or rediss:// (several; with "
        "?socket_timeout=SECONDS for a slow network), memory://, or file:///PATH of a file that "
        "contains one of these, for a URL with a password; a gateway uses it only as --registry",
        metavar="URL",
        secret=True,
    )
    registry: str = option(
        "",
        "Redis in which workers register and gateways find them: redis:// or rediss://, with "
        "?namespace=NAME if deployments share one, or file:///PATH as in --store; none: no "
        "registry. Default: --store if that is Redis; none under `up`",
        group=Group.WORKERS,
        metavar="URL",
        secret=True,
        expects="redis://HOST:PORT/DB, rediss://, unix://, file:///PATH or none",
        check=check_registry,
    )

    def read_url(self) -> str:
        """The store's URL: ``store``, or the contents of the file it names. Raises ConfigError."""
        return read_url(self.store, "store")

    def read_registry(self) -> str | None:
        """The registry's URL; None without a registry. Raises ConfigError."""
        if self.registry == NO_REGISTRY:
            return None
        given = "registry" if self.registry else "store"
        url = read_url(self.registry or self.store, given)
        try:
            if urlsplit(url).scheme in REDIS_SCHEMES:
                return url
        except ValueError as error:
            raise ConfigError(f"--{given} is no URL of a Redis", param=given) from error
        if self.registry:
            raise ConfigError("a registry is redis://, rediss:// or unix://", param="registry")
        return None

    def registry_of_worker(self, rpc: RpcConfig) -> str | None:
        """The URL of the registry that a worker joins; None for none. A worker with a loopback
        address cannot join a registry on another machine: this raises ConfigError if --registry
        asks for it, and warns if the registry is merely the store's Redis."""
        url = self.read_registry()
        where = rpc.advertise and addresses.host_of(rpc.advertise)
        host = where or ("127.0.0.1" if addresses.is_wildcard(rpc.host) else rpc.host)
        if url is None or not (addresses.is_loopback(host) and addresses.is_elsewhere(url)):
            return url
        fault = (
            f"gateways on other machines cannot reach a worker at {host}: start it with --advertise"
            " HOST:PORT, the address at which they do"
        )
        if self.registry:
            raise ConfigError(f"{fault}, or with --registry none", param="advertise")
        log.warning("the worker is not in the registry, the Redis of --store: %s", fault)
        return None


@dataclass(frozen=True)
class StoreConfig(RegistryConfig):
    """RegistryConfig, and how embeddings are kept."""

    store_key_file: str | None = _store(
        None,
        "file with the secret that signs embeddings sent to other machines; `up` makes one",
        metavar="FILE",
    )
    store_ttl_s: int = _store(3600, "how long Redis keeps an embedding", minimum=1)


@dataclass(frozen=True)
class TelemetryConfig:
    """Logs, metrics and traces."""

    log_level: str = _telemetry(
        "info", "lowest level that is logged", choices=("debug", "info", "warning", "error")
    )
    log_format: str = _telemetry(
        "text", "lines for people, or one JSON object a line", choices=("text", "json")
    )
    metrics_port: int = _telemetry(
        -1,
        "separate port for Prometheus' /metrics; 0: a free one; -1: none",
        minimum=-1,
        maximum=65535,
    )
    metrics_host: str = _telemetry(
        "",
        "interface of --metrics-port; default: that of the service, --host",
        metavar="HOST",
    )
    otlp_endpoint: str | None = _telemetry(
        None,
        "collector of OpenTelemetry traces, such as http://127.0.0.1:4317; default: that of "
        "OTEL_EXPORTER_OTLP_ENDPOINT, or no traces",
        metavar="URL",
    )
