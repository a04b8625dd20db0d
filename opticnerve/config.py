"""Configuration: one frozen dataclass a service, composed of shared parts.

A field is a flag (``--max-num-seqs``), an environment variable (``OPTICNERVE_MAX_NUM_SEQS``) and
an attribute, under one name: see ``opticnerve.options``. What nobody knows is refused: an unknown
flag, and an unknown ``OPTICNERVE_`` variable. Variables by which Kubernetes tells of Services
(``options.is_service_link``) are ignored.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opticnerve import addresses
from opticnerve.errors import ConfigError
from opticnerve.media.plan import parse_background
from opticnerve.options import PREFIX, is_service_link, option, options
from opticnerve.telemetry import logs

log = logging.getLogger(__name__)

KNOWN_VARIABLES = {"OPTICNERVE_CACHE_DIR"}  # Read elsewhere: opticnerve.checkpoints.digests.

# Titles in --help, in this order.
GROUPS = (
    "Processes",
    "Model",
    "Address",
    "Workers",
    "Embedding store",
    "Batches and queues",
    "Engine",
    "API",
    "Pictures",
    "Media from URLs",
    "Limits of requests",
    "Logs and metrics",
)
(
    _processes,
    _model,
    _address,
    _workers,
    _store,
    _batches,
    _engine,
    _api,
    _pictures,
    _urls,
    _limits,
    _telemetry,
) = (partial(option, group=title) for title in GROUPS)
_port = partial(_address, metavar="PORT", most=65535)
_parent = partial(_address, metavar="PID", hidden=True)

LEAST_IMAGE_PIXELS = 64 * 64  # As a limit: an encoder tries itself on such a picture at start.
LEAST_DECODE_PASSES = 2**20  # Likewise; what the markers of an ordinary picture may take.
STOP_HELP = "how long running requests may go on after SIGTERM or Ctrl-C; a second one ends them"
TOKEN_HELP = (
    "file of the token that the gateway's and its workers' calls to each other carry: one secret "
    "for all of them, such as `openssl rand -hex 32` makes; `up` makes its own"
)
MANY_HELP = "HOST:PORT, or dns:///NAME:PORT for all behind a name, of which NAME:PORT is one"


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoint."""

    model: str | None = _model(
        None, "checkpoint directory or hub id; without one, the built-in demo checkpoint"
    )
    revision: str | None = _model(None, "branch, tag or commit on the hub", metavar="NAME")
    download_dir: str | None = _model(None, "where hub checkpoints are kept", metavar="DIR")


@dataclass(frozen=True)
class ModelConfig(CheckpointConfig):
    """Which checkpoint, and how its tensors are computed with."""

    dtype: str = _model(
        "auto",
        "type of weights and activations; auto: the checkpoint's own, or float32 on a CPU that "
        "has no arithmetic in that one",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    device: str = _model(
        "auto", "cpu, cuda or cuda:N; auto: CUDA where there is one", metavar="DEVICE"
    )
    threads: int = _model(
        0,
        "CPU threads for tensor work of one process; 0: all cores, under `up` shared among the "
        "encoders and, once more, among the LLM workers",
        metavar="N",
    )

    @property
    def num_threads(self) -> int:
        """Threads for tensor work. They sleep while there is none (``cli.wait_briefly``), so the
        event loop needs no core of its own."""
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class RpcConfig:
    """Where an internal service listens, and how it leaves."""

    host: str = _address(
        "127.0.0.1", "where to listen; 0.0.0.0: on every interface", metavar="HOST"
    )
    port: int = _port(0, "port to listen on; 0: a free one, which is printed")
    advertise: str | None = _address(
        None,
        "the address that other services, gateways too, reach this one at; needed where --host is "
        "0.0.0.0 and they run on other machines",
        metavar="HOST:PORT",
        wanted="HOST:PORT that the other services call, such as 10.0.0.5:7001: one machine's name "
        "or IP and a port from 1 to 65535, no wildcard such as 0.0.0.0",
        check=addresses.check_advertised,
    )
    rpc_token_file: str | None = _address(None, TOKEN_HELP, metavar="FILE")
    insecure: bool = _address(
        False,
        "listen beyond this machine without --rpc-token-file: where the network keeps out whoever "
        "may not use this worker",
    )
    reflection: bool = _address(
        False, "answer gRPC's reflection, by which tools like grpcurl see what can be called"
    )
    drain_timeout_s: float = _address(15.0, STOP_HELP, metavar="SECONDS")
    parent_pid: int = _parent(0, "end when this process is gone; set by whoever starts this one")

    def __post_init__(self) -> None:
        """Raises ConfigError where anybody on the network could use the worker and nobody said
        that this is meant."""
        if self.rpc_token_file or self.insecure or addresses.is_loopback(self.host):
            return
        raise ConfigError(
            f"at --host {self.host} whoever reaches the port could use this worker: give it and "
            "all that call it one --rpc-token-file FILE (`umask 077; openssl rand -hex 32 > FILE`),"
            " or, where the network keeps others out, --insecure",
            param="rpc_token_file",
        )


@dataclass(frozen=True)
class StoreConfig:
    """Where embeddings are kept."""

    store: str = _store(
        "shm://",
        "shm://[DIR][?capacity=SIZE] (one machine), redis:// or rediss:// (many), with "
        "?socket_timeout=SECONDS where it is far away, memory://, or file:///PATH of a file that "
        "holds one of these, for a URL with a password",
        metavar="URL",
        secret=True,
    )
    store_key_file: str | None = _store(
        None,
        "file of the secret under which embeddings are signed that leave a machine; `up` makes one",
        metavar="FILE",
    )
    store_ttl_s: int = _store(3600, "how long Redis keeps an embedding", metavar="SECONDS", least=1)

    def read_url(self) -> str:
        """The store's URL: ``store``, or what the file holds that it names. Raises ConfigError."""
        if not self.store.startswith("file:"):
            return self.store
        path = self.store.removeprefix("file://")
        if not path.startswith("/"):
            raise ConfigError("file:// takes an absolute path: file:///PATH", param="store")
        try:
            url = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the store's URL from {path}", param="store") from error
        if url.split() != [url] or url.startswith("file:"):
            raise ConfigError(
                f"{path} should hold one URL and nothing else, such as redis://:PASSWORD@HOST/0",
                param="store",
            )
        return url


@dataclass(frozen=True)
class TelemetryConfig:
    log_level: str = _telemetry(
        "info", "the least that is logged", choices=("debug", "info", "warning", "error")
    )
    log_format: str = _telemetry(
        "text", "lines for people, or one JSON object a line", choices=("text", "json")
    )
    metrics_port: int = _telemetry(
        -1,
        "port of its own for Prometheus' /metrics; 0: a free one, -1: none",
        metavar="PORT",
        least=-1,
        most=65535,
    )
    metrics_host: str = _telemetry(
        "",
        "where --metrics-port listens; default: where the service does, at --host",
        metavar="HOST",
    )


@dataclass(frozen=True)
class EncoderConfig:
    """`opticnerve encoder`"""

    model: ModelConfig = ModelConfig()
    rpc: RpcConfig = RpcConfig()
    store: StoreConfig = StoreConfig()
    max_batch_patches: int = _batches(
        0, "patches of one forward pass; 0: sized from the device", metavar="N"
    )
    max_queue_patches: int = _batches(
        0, "patches that may wait before items are refused; 0: 16 batches", metavar="N"
    )
    preprocess_workers: int = _batches(
        0, "threads that decode and resize pictures; 0: one a core", metavar="N"
    )
    max_item_bytes: int = _pictures(
        20 * 2**20, "compressed size of one picture, at the encoder", metavar="BYTES", size=True
    )
    max_image_pixels: int = _pictures(
        89_478_485,
        "pixels of one picture as it comes; larger ones are refused",
        metavar="N",
        least=LEAST_IMAGE_PIXELS,
    )
    max_decode_passes: int = _pictures(
        2**30,
        "work of decoding one picture, in pixels decoded once, read from its structure: a "
        "progressive JPEG's is its pixels times its scans; more is refused",
        metavar="N",
        least=LEAST_DECODE_PASSES,
    )
    max_decode_bytes: int = _pictures(
        0,
        "memory for pictures that are being decoded, a quarter of it for light ones; one always "
        "fits. 0: 256MiB a preprocess worker, 2GiB at least",
        metavar="BYTES",
        size=True,
    )
    decode_timeout_s: float = _pictures(
        30.0,
        "how much of a core's time decoding a heavy picture may take before it is ended",
        metavar="SECONDS",
    )
    telemetry: TelemetryConfig = TelemetryConfig()


@dataclass(frozen=True)
class LLMConfig:
    """`opticnerve llm`"""

    model: ModelConfig = ModelConfig()
    rpc: RpcConfig = RpcConfig()
    store: StoreConfig = StoreConfig()
    fetch_from: tuple[str, ...] = _store(
        (),
        "hosts whose encoders embeddings may be fetched from, where the store has none; default: "
        "with --rpc-token-file those that callers name, else this machine, where --host is "
        "loopback, or none",
        metavar="HOST,...",
        wanted="a host: a name, *.NAME for all below one, an IP or a network such as 10.0.0.0/8",
        check=addresses.check_host,
    )
    max_model_len: int = _engine(
        0, "tokens of prompt and output together; 0: as many as the model knows", metavar="N"
    )
    max_num_seqs: int = _engine(64, "sequences that run at once", metavar="N", least=1)
    max_num_batched_tokens: int = _engine(2048, "tokens of one step", metavar="N", least=1)
    max_step_ms: int = _engine(
        250,
        "how long one step may take while any sequence decodes: prompts are computed in chunks "
        "that fit, by the speed measured; 0: chunks of any length",
        metavar="MS",
    )
    max_waiting: int = _engine(
        1024, "requests that may wait before more are refused", metavar="N", least=1
    )
    kv_cache_tokens: int = _engine(
        0, "tokens that the KV cache holds; 0: sized from memory", metavar="N"
    )
    no_prefix_caching: bool = _engine(False, "do not share KV pages between requests")
    attention: str = _engine("auto", "attention backend", choices=("auto", "sdpa"))
    engine: str = _engine(
        "thread",
        "run the engine in a thread, or in a process of its own",
        choices=("thread", "process"),
    )
    embedding_wait_ms: int = _engine(
        30_000, "how long a sequence waits for its embeddings", metavar="MS"
    )
    max_logprobs: int = _limits(20, "largest `top_logprobs` of a request", metavar="N")
    telemetry: TelemetryConfig = TelemetryConfig()


@dataclass(frozen=True)
class GatewayConfig:
    """`opticnerve gateway`"""

    model: CheckpointConfig = CheckpointConfig()
    host: str = _address(
        "", "where to listen; default: 127.0.0.1, or with API keys 0.0.0.0", metavar="HOST"
    )
    port: int = _port(8000, "port to listen on; 0: a free one, which is printed")
    shutdown_delay_s: float = _address(
        0.0,
        "how long new requests are still taken after SIGTERM or Ctrl-C, while /ready fails: for "
        "what sends them here to notice; --drain-timeout-s begins then",
        metavar="SECONDS",
    )
    drain_timeout_s: float = _address(15.0, STOP_HELP, metavar="SECONDS")
    parent_pid: int = _parent(0, "end when this process is gone; set by whoever starts this one")
    encoder_addresses: tuple[str, ...] = _workers(
        (),
        f"encoders: {MANY_HELP}; without any, text alone is served",
        metavar="HOST:PORT,...",
        check=addresses.check_name,
    )
    llm_addresses: tuple[str, ...] = _workers(
        (), f"LLM workers: {MANY_HELP}", metavar="HOST:PORT,...", check=addresses.check_name
    )
    rpc_token_file: str | None = _workers(None, TOKEN_HELP, metavar="FILE")
    worker_wait_s: float = _workers(
        120.0, "how long a request waits while no worker is up", metavar="SECONDS"
    )
    encode_timeout_s: float = _workers(120.0, "deadline of one encode call", metavar="SECONDS")
    served_model_name: tuple[str, ...] = _api(
        (),
        "names that requests may use, * for any; default: the directory's name and `model`",
        metavar="NAME,...",
    )
    api_key_file: str | None = _api(
        None,
        "file of the keys that may call, one `name: key` or `key` a line, and after it `tenant=`, "
        "`weight=` and `priority=`, such as `ada: sk-1 tenant=acme weight=2 priority=-10`: whose "
        "caches it shares (default: its own), its share of the decoder (1), the lowest `priority` "
        "of its requests (0; lower runs first); SIGHUP reads it again",
        metavar="FILE",
    )
    share_cache: bool = _api(
        False,
        "share cached prefixes and pictures among tenants: less work where they send the same, but "
        "time, usage and timings tell one of them what another sent; default: a tenant shares its "
        "own",
    )
    public_models: bool = _api(False, "/v1/models needs no key")
    cors_origins: tuple[str, ...] = _api(
        (),
        "origins that browsers may call from, * for any; where no key is asked for on a loopback "
        "address, requests from others are refused",
        metavar="ORIGIN,...",
    )
    allowed_hosts: tuple[str, ...] = _api(
        (),
        "names that requests may call this server by where no key is asked for on a loopback "
        "address, besides localhost, such addresses and --host; * for any",
        metavar="NAME,...",
    )
    chat_template: str | None = _api(
        None, "file or text that replaces the model's chat template", metavar="FILE"
    )
    generation_config: str = _api(
        "auto",
        "sampling defaults: auto (the model's own), neutral, or those in a directory",
        metavar="DIR",
    )
    ignore_unknown_fields: bool = _api(
        False,
        "warn about unknown fields of a request's body instead of a 400, as always of those of the "
        "objects in it",
    )
    max_images: int = _pictures(10, "pictures of one request", metavar="N")
    min_pixels: int = _pictures(
        0, "pictures are resized to at least so many pixels; 0: the model's", metavar="N"
    )
    max_pixels: int = _pictures(
        0, "pictures are resized to at most so many pixels; 0: the model's", metavar="N"
    )
    image_background: str = _pictures(
        "white",
        "colour that shows through transparent pictures, by name or as #rrggbb; none: transparency "
        "is dropped, and the colours that it hid are seen",
        metavar="COLOR|none",
        wanted="an opaque colour such as white or #ffffff, or none",
        check=parse_background,
    )
    max_image_pixels: int = _pictures(
        89_478_485,
        "pixels of one picture as it comes; larger ones are refused",
        metavar="N",
        least=LEAST_IMAGE_PIXELS,
    )
    max_decode_passes: int = _pictures(
        2**30,
        "work of decoding one picture, in pixels decoded once, read from its structure: a "
        "progressive JPEG's is its pixels times its scans; more is refused",
        metavar="N",
        least=LEAST_DECODE_PASSES,
    )
    max_media_bytes: int = _pictures(
        20 * 2**20, "compressed size of one picture, at the gateway", metavar="BYTES", size=True
    )
    allow_remote_media: bool = _urls(True, "fetch http and https URLs")
    allowed_media_domains: tuple[str, ...] = _urls(
        (), "fetch from these alone; default: any public address", metavar="DOMAIN,..."
    )
    allow_private_media: bool = _urls(False, "fetch from private and loopback addresses too")
    allowed_media_root: str | None = _urls(
        None, "read file:// URLs under this directory; default: none are read", metavar="DIR"
    )
    media_timeout_s: float = _urls(10.0, "how long fetching one item may take", metavar="SECONDS")
    media_redirects: int = _urls(3, "redirects that are followed for one item", metavar="N")
    max_connections: int = _limits(
        4096,
        "connections of clients; where one more comes, the key or address that has most loses one "
        "that waits for its client; what ulimit -n must allow",
        metavar="N",
        least=1,
    )
    max_connections_per_address: int = _limits(
        0,
        "connections of one address before its next ones are closed, also while others have none; "
        "0: --max-connections. Not for a gateway behind a proxy, whose address is everybody's",
        metavar="N",
    )
    max_concurrent_requests: int = _limits(
        512,
        "requests in flight before a 429; three quarters of them may have new pictures",
        metavar="N",
    )
    max_requests_per_key: int = _limits(
        0,
        "requests in flight of one key, or without keys of one address, before a 429; 0: all, and "
        "where there are several, the last quarter of places and bytes is for those that have less "
        "than an equal share",
        metavar="N",
    )
    max_bytes_in_flight: int = _limits(
        2**30, "bytes that requests may hold before a 429", metavar="BYTES", size=True
    )
    max_request_bytes: int = _limits(
        64 * 2**20, "size of one HTTP request body", metavar="BYTES", size=True
    )
    max_request_values: int = _limits(
        100_000, "objects, lists and their entries in one request body", metavar="N", least=1
    )
    max_encode_wait_s: float = _limits(
        0.0,
        "expected wait for an encoder beyond which a request with new pictures gets a 429; 0: the "
        "request's deadline",
        metavar="SECONDS",
    )
    max_answer_bytes: int = _limits(
        64 * 2**20, "size of one answer that is not streamed", metavar="BYTES", size=True
    )
    body_timeout_s: float = _limits(
        60.0, "how long a request body may take to arrive", metavar="SECONDS"
    )
    stall_timeout_s: float = _limits(
        30.0,
        "in which a client must send 8 KiB more of a body, or take 8 KiB more of its answers, or "
        "all that is left",
        metavar="SECONDS",
    )
    request_timeout_s: float = _limits(
        600.0, "deadline of one request, end to end", metavar="SECONDS"
    )
    max_logprobs: int = _limits(20, "largest `top_logprobs` of a request", metavar="N")
    max_n: int = _limits(
        128, "largest `n` of a request; its choices have one share", metavar="N", least=1, most=128
    )
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def listen_host(self) -> str:
        """Where the gateway listens: without keys only this machine may call by default."""
        return self.host or ("0.0.0.0" if self.api_key_file else "127.0.0.1")


@dataclass(frozen=True)
class UpConfig:
    """`opticnerve up`; every other flag goes to the services that know it."""

    encoders: int = _processes(1, "encoder processes", metavar="N", least=1)
    llms: int = _processes(1, "LLM processes", metavar="N", least=1)
    encoder_devices: tuple[str, ...] = _processes(
        (), "CUDA devices of the encoders, shared in turn, such as 0,1", metavar="N,..."
    )
    llm_devices: tuple[str, ...] = _processes(
        (), "CUDA devices of the LLM workers, shared in turn, such as 2,3", metavar="N,..."
    )
    start_timeout_s: float = _processes(
        600.0, "how long a process may take to become healthy", metavar="SECONDS"
    )
    max_restarts: int = _processes(
        5, "crashes of one process within a minute before giving up", metavar="N"
    )


def check_environment(environment: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for an ``OPTICNERVE_`` variable that no service knows and that is no
    service link of Kubernetes."""
    environment = os.environ if environment is None else environment
    known = set(KNOWN_VARIABLES)
    for cls in (EncoderConfig, LLMConfig, GatewayConfig, UpConfig):
        known.update(item.variable for item in options(cls))
    for name in sorted(environment):
        link = is_service_link(name, environment[name])
        if name.startswith(PREFIX) and name not in known and not link:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown environment variable {name}{hint}", param=name)


def begin_logs(settings: TelemetryConfig, environment: Mapping[str, str] | None = None) -> None:
    """Sets the process's logs up; their first line names the service links that are ignored."""
    logs.configure(settings.log_level, settings.log_format)
    environment = os.environ if environment is None else environment
    links = sorted(name for name, value in environment.items() if is_service_link(name, value))
    if links:
        log.warning(
            "ignoring Kubernetes' service links (%s); `enableServiceLinks: false` in the pod's "
            "spec leaves them out",
            ", ".join(links),
        )
