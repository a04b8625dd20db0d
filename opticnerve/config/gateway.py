"""``opticnerve gateway``"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from opticnerve import addresses
from opticnerve.config import shared
from opticnerve.config.options import Group, option
from opticnerve.media.plan import parse_background

_address = partial(option, group=Group.ADDRESS)
_workers = partial(option, group=Group.WORKERS)
_api = partial(option, group=Group.API)
_pictures = partial(option, group=Group.PICTURES)
_urls = partial(option, group=Group.URLS)
_limits = partial(option, group=Group.LIMITS)

ADDRESSES = "HOST:PORT, or dns:///NAME:PORT for all behind a name, of which NAME:PORT is one"


@dataclass(frozen=True)
class GatewayConfig:
    """Settings of a gateway."""

    model: shared.CheckpointConfig = shared.CheckpointConfig()
    host: str = _address(
        "", "where to listen; default: 127.0.0.1, or with API keys 0.0.0.0", metavar="HOST"
    )
    port: int = _address(8000, "port to listen on; 0: a free one, which is printed", maximum=65535)
    shutdown_delay_s: float = _address(
        0.0,
        "how long new requests are still taken after SIGTERM or Ctrl-C, while /ready fails: for "
        "what sends them here to notice; --drain-timeout-s begins then",
    )
    drain_timeout_s: float = _address(15.0, shared.DRAIN_HELP)
    parent_pid: int = _address(0, shared.PARENT_HELP, metavar="PID", hidden=True)
    encoder_addresses: tuple[str, ...] = _workers(
        (),
        f"encoders: {ADDRESSES}; without any, text alone is served",
        metavar="HOST:PORT,...",
        check=addresses.check_target,
    )
    llm_addresses: tuple[str, ...] = _workers(
        (), f"LLM workers: {ADDRESSES}", metavar="HOST:PORT,...", check=addresses.check_target
    )
    rpc_token_file: str | None = _workers(None, shared.TOKEN_HELP, metavar="FILE")
    worker_wait_s: float = _workers(120.0, "how long a request waits while no worker is up")
    encode_timeout_s: float = _workers(120.0, "deadline of one encode call")
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
    max_images: int = _pictures(10, "pictures of one request")
    min_pixels: int = _pictures(
        0, "pictures are resized to at least so many pixels; 0: the model's"
    )
    max_pixels: int = _pictures(0, "pictures are resized to at most so many pixels; 0: the model's")
    image_background: str = _pictures(
        "white",
        "colour that shows through transparent pictures, by name or as #rrggbb; none: transparency "
        "is dropped, and the colours that it hid are seen",
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
        (), "fetch from these alone; default: any public address", metavar="DOMAIN,..."
    )
    allow_private_media: bool = _urls(False, "fetch from private and loopback addresses too")
    allowed_media_root: str | None = _urls(
        None, "read file:// URLs under this directory; default: none are read", metavar="DIR"
    )
    media_timeout_s: float = _urls(10.0, "how long fetching one item may take")
    media_redirects: int = _urls(3, "redirects that are followed for one item")
    max_connections: int = _limits(
        4096,
        "connections of clients; where one more comes, the key or address that has most loses one "
        "that waits for its client; what ulimit -n must allow",
        minimum=1,
    )
    max_connections_per_address: int = _limits(
        0,
        "connections of one address before its next ones are closed, also while others have none; "
        "0: --max-connections. Not for a gateway behind a proxy, whose address is everybody's",
    )
    max_concurrent_requests: int = _limits(
        512, "requests in flight before a 429; three quarters of them may have new pictures"
    )
    max_requests_per_key: int = _limits(
        0,
        "requests in flight of one key, or without keys of one address, before a 429; 0: all, and "
        "where there are several, the last quarter of places and bytes is for those that have less "
        "than an equal share",
    )
    max_bytes_in_flight: int = _limits(
        2**30, "bytes that requests may hold before a 429", size=True
    )
    max_request_bytes: int = _limits(64 * 2**20, "size of one HTTP request body", size=True)
    max_request_values: int = _limits(
        100_000, "objects, lists and their entries in one request body", minimum=1
    )
    max_encode_wait_s: float = _limits(
        0.0,
        "expected wait for an encoder beyond which a request with new pictures gets a 429; 0: the "
        "request's deadline",
    )
    max_answer_bytes: int = _limits(
        64 * 2**20, "size of one answer that is not streamed", size=True
    )
    body_timeout_s: float = _limits(60.0, "how long a request body may take to arrive")
    stall_timeout_s: float = _limits(
        30.0,
        "in which a client must send 8 KiB more of a body, or take 8 KiB more of its answers, or "
        "all that is left",
    )
    request_timeout_s: float = _limits(600.0, "deadline of one request, end to end")
    max_logprobs: int = shared.MAX_LOGPROBS()
    max_n: int = _limits(
        128, "largest `n` of a request; its choices have one share", minimum=1, maximum=128
    )
    telemetry: shared.TelemetryConfig = shared.TelemetryConfig()

    @property
    def listen_host(self) -> str:
        """Where the gateway listens: without keys only this machine may call by default."""
        return self.host or ("0.0.0.0" if self.api_key_file else "127.0.0.1")
