"""``opticnerve gateway``"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from opticnerve import addresses
from opticnerve.config import shared
from opticnerve.config.options import Group, option
from opticnerve.errors import ConfigError
from opticnerve.generation.values import MAX_CHOICES
from opticnerve.media.plan import parse_background

_address = partial(option, group=Group.ADDRESS)
_https = partial(option, group=Group.HTTPS)
_workers = partial(option, group=Group.WORKERS)
_api = partial(option, group=Group.API)
_pictures = partial(option, group=Group.PICTURES)
_urls = partial(option, group=Group.URLS)
_limits = partial(option, group=Group.LIMITS)

ADDRESSES = "HOST:PORT, or dns:///NAME:PORT for every address that the name resolves to"


@dataclass(frozen=True)
class HttpsConfig:
    """HTTPS: the gateway's certificate, and the authorities that sign clients' certificates."""

    https_certificate: str | None = _https(
        None,
        "the gateway's certificate in PEM, with its chain; the port then speaks only HTTPS; read "
        "again when it changes",
        metavar="FILE",
    )
    https_key: str | None = _https(
        None, "private key of --https-certificate, without a passphrase", metavar="FILE"
    )
    https_client_ca: str | None = _https(
        None,
        "certificates in PEM of the authorities that sign clients' certificates: clients without "
        "one are refused, health checks included",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        """Raises ConfigError if one of the files is given without another that it needs."""
        if (self.https_certificate is None) != (self.https_key is None):
            raise ConfigError("--https-certificate and --https-key go together", param="https_key")
        if self.https_client_ca and not self.https_certificate:
            raise ConfigError(
                "--https-client-ca needs --https-certificate", param="https_client_ca"
            )

    @property
    def scheme(self) -> str:
        return "https" if self.https_certificate else "http"


@dataclass(frozen=True)
class GatewayConfig:
    """Settings of a gateway."""

    model: shared.CheckpointConfig = shared.CheckpointConfig()
    host: str = _address(
        "", "interface to listen on; default: 127.0.0.1, or 0.0.0.0 with API keys", metavar="HOST"
    )
    port: int = _address(8000, "port to listen on; 0: a free one, which is printed", maximum=65535)
    shutdown_delay_s: float = _address(
        0.0,
        "how long new requests are still accepted after SIGTERM or Ctrl-C while /ready fails, so "
        "that load balancers can notice; --drain-timeout-s begins after it",
    )
    drain_timeout_s: float = _address(15.0, shared.DRAIN_HELP)
    workers: int = option(
        1,
        "gateway processes that serve the port together, where one is the limit; each has an equal "
        "share of the bounds on connections, requests in flight and their bytes",
        group=Group.PROCESSES,
        minimum=1,
        maximum=256,
    )
    parent_pid: int = _address(0, shared.PARENT_HELP, metavar="PID", hidden=True)
    listen_fd: int | None = _address(
        None, "listening socket inherited from the parent", metavar="FD", hidden=True
    )
    shared_directory: str | None = _address(
        None, "what the processes of one parent count together", metavar="DIR", hidden=True
    )
    https: HttpsConfig = HttpsConfig()
    encoder_addresses: tuple[str, ...] = _workers(
        (),
        f"encoders: {ADDRESSES}; without any, and without --registry, only text is served",
        metavar="HOST:PORT,...",
        check=addresses.check_target,
    )
    llm_addresses: tuple[str, ...] = _workers(
        (), f"LLM workers: {ADDRESSES}", metavar="HOST:PORT,...", check=addresses.check_target
    )
    store: shared.RegistryConfig = shared.RegistryConfig()  # Where the workers' registry is.
    rpc_token_file: str | None = _workers(None, shared.TOKEN_HELP, metavar="FILE")
    certificate: shared.CertificateConfig = shared.CertificateConfig()
    calls: shared.CallsConfig = shared.CallsConfig()  # To workers.
    worker_wait_s: float = _workers(120.0, "how long a request waits for a worker when none is up")
    encode_timeout_s: float = _workers(120.0, "deadline of one Encode call")
    served_model_name: tuple[str, ...] = _api(
        (),
        "names of the model in requests, * for any; default: the directory's name and `model`",
        metavar="NAME,...",
    )
    api_key_file: str | None = _api(
        None,
        "file of API keys, one a line: `key` or `name: key`, then optional attributes, such as "
        "`ada: sk-1 tenant=acme weight=2 priority=-10 rate=60/m concurrency=8 models=NAME,NAME`. "
        "tenant: keys of one tenant share caches (default: one tenant a key); weight: share of the "
        "decoder (1); priority: the lowest `priority` that its requests may ask for (0; lower runs "
        "first); rate: requests per second (s), minute (m) or hour (h); concurrency: requests in "
        "flight; models: served names that it may use. SIGHUP reads it again",
        metavar="FILE",
    )
    share_cache: bool = _api(
        False,
        "share cached prefixes and pictures among all tenants, not only within one: saves work if "
        "they send the same, but latency, usage and timings reveal to one what another sent",
    )
    public_models: bool = _api(False, "serve /v1/models without a key")
    cors_origins: tuple[str, ...] = _api(
        (),
        "origins that browsers may call from, * for any; without API keys on a loopback address, "
        "requests from other origins are refused",
        metavar="ORIGIN,...",
    )
    allowed_hosts: tuple[str, ...] = _api(
        (),
        "names that a request's Host may have without API keys on a loopback address, besides "
        "localhost, loopback addresses and --host; * for any",
        metavar="NAME,...",
    )
    chat_template: str | None = _api(
        None,
        "replacement for the model's chat template: a file, a template's text, or the name of one "
        "of the model's other templates",
        metavar="NAME|FILE",
    )
    allow_request_template: bool = _api(
        False,
        "render a chat with the request's own `chat_template`, if it has one; one after another, "
        "in a process with bounded time and memory",
    )
    default_system_prompt: str | None = _api(
        None,
        "system message of chats that have none: the text, or @FILE",
        metavar="TEXT|@FILE",
        secret=True,
    )
    default_sampling: str | None = _api(
        None,
        "values for sampling fields that a request omits, which override --generation-config, such "
        'as \'{"temperature": 0.2, "max_tokens": 512}\'; fields: temperature, top_p, top_k, min_p, '
        "frequency_penalty, presence_penalty, repetition_penalty, max_tokens",
        metavar="JSON",
    )
    tool_parser: str = _api(
        "auto",
        "format of the model's tool calls: hermes (Qwen too), llama3_json, mistral, pythonic, auto "
        "(from its chat template), or none",
        choices=("auto", "none", "hermes", "llama3_json", "mistral", "pythonic"),
    )
    reasoning_parser: str = _api(
        "auto",
        "markers around the model's reasoning: think (<think>), mistral ([THINK]), kimi, seed "
        "(<seed:think>), auto (the checkpoint's), or none",
        choices=("auto", "none", "think", "mistral", "kimi", "seed"),
    )
    generation_config: str = _api(
        "auto",
        "sampling defaults: auto (the model's own), neutral, or those in a directory",
        metavar="DIR",
    )
    ignore_unknown_fields: bool = _api(
        False,
        "warn about unknown top-level fields of a request body instead of answering 400; unknown "
        "fields of nested objects only ever cause a warning",
    )
    max_images: int = _pictures(10, "pictures in one request")
    min_pixels: int = _pictures(
        0, "smallest size that pictures are resized to, in pixels; 0: the model's"
    )
    max_pixels: int = _pictures(
        0, "largest size that pictures are resized to, in pixels; 0: the model's"
    )
    image_background: str = _pictures(
        "white",
        "colour behind transparent pictures, by name or as #rrggbb; none: drop transparency, which "
        "shows the colours that it hid",
        metavar="COLOR|none",
        expects="an opaque colour such as white or #ffffff, or none",
        check=parse_background,
    )
    max_image_pixels: int = shared.MAX_IMAGE_PIXELS()
    max_decode_passes: int = shared.MAX_DECODE_PASSES()
    max_media_bytes: int = _pictures(
        20 * 2**20, "compressed size of one picture, at the gateway", size=True
    )
    allow_remote_media: bool = _urls(True, "fetch http and https URLs")
    allowed_media_domains: tuple[str, ...] = _urls(
        (), "fetch only from these; default: from any public address", metavar="DOMAIN,..."
    )
    allow_private_media: bool = _urls(False, "also fetch from private and loopback addresses")
    allowed_media_root: str | None = _urls(
        None, "read file:// URLs below this directory; default: refuse them", metavar="DIR"
    )
    media_timeout_s: float = _urls(10.0, "deadline of fetching one item")
    media_redirects: int = _urls(3, "redirects to follow for one item")
    max_connections: int = _limits(
        4096,
        "client connections; over the limit, the key or address with the most of them loses one "
        "that is waiting for its client. `ulimit -n` must allow for it",
        minimum=1,
    )
    max_connections_per_address: int = _limits(
        0,
        "connections of one address, over which new ones are closed; 0: --max-connections. Not for "
        "a gateway behind a proxy, which gives all clients one address",
    )
    max_concurrent_requests: int = _limits(
        512,
        "requests in flight, over which a 429 is answered; three quarters of them may have new "
        "pictures",
    )
    max_requests_per_key: int = _limits(
        0,
        "requests in flight of one key, or of one address without keys, over which a 429 is "
        "answered; 0: no limit, but with several keys the last quarter of places and bytes is "
        "reserved for those that have less than an equal share",
    )
    max_realtime_sessions: int = _limits(
        256,
        "open realtime sessions, at most half of --max-connections, over which a 429 is answered; "
        "--max-requests-per-key applies to them too",
    )
    max_bytes_in_flight: int = _limits(
        2**30,
        "bytes held by requests in flight and realtime sessions, over which a 429 is answered",
        size=True,
    )
    max_request_bytes: int = _limits(64 * 2**20, "size of one HTTP request body", size=True)
    max_request_values: int = _limits(
        100_000, "JSON objects, lists and their entries in one request body", minimum=1
    )
    max_encode_wait_s: float = _limits(
        0.0,
        "expected wait for an encoder, over which a request with new pictures gets a 429; 0: the "
        "request's deadline",
    )
    max_answer_bytes: int = _limits(
        64 * 2**20, "size of one answer that is not streamed", size=True
    )
    body_timeout_s: float = _limits(60.0, "how long a request body may take to arrive")
    stall_timeout_s: float = _limits(
        30.0,
        "time in which a client must send the next 8 KiB of a body, or read the next 8 KiB of its "
        "answers, or the rest if it is less",
    )
    request_timeout_s: float = _limits(600.0, "deadline of one request, end to end")
    max_logprobs: int = shared.MAX_LOGPROBS()
    max_n: int = _limits(
        MAX_CHOICES,
        "largest `n` of a request; its choices share one request's share of the decoder",
        minimum=1,
        maximum=MAX_CHOICES,
    )
    telemetry: shared.TelemetryConfig = shared.TelemetryConfig()

    def __post_init__(self) -> None:
        """Raises ConfigError if calls to workers would not be encrypted."""
        self.calls.check_certificate(self.certificate)

    @property
    def listen_host(self) -> str:
        """The interface to listen on; by default loopback only, or all with API keys."""
        return self.host or ("0.0.0.0" if self.api_key_file else "127.0.0.1")
