"""Configuration: one frozen dataclass a service, composed of shared parts.

A field is a flag (``--max-num-seqs``), an environment variable (``OPTICNERVE_MAX_NUM_SEQS``) and
an attribute, under one name. A flag wins over the environment, which wins over the default.
What nobody knows is refused: an unknown flag by argparse, an unknown ``OPTICNERVE_`` variable by
``check_environment``. Sequences are written with commas.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from opticnerve.errors import ConfigError

PREFIX = "OPTICNERVE_"
KNOWN_VARIABLES = {"OPTICNERVE_CACHE_DIR"}  # Read elsewhere: opticnerve.models.checkpoint.

C = TypeVar("C")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    secret: bool = False,
    least: int = 0,
) -> Any:
    """A dataclass field that is also a flag. ``secret`` values never appear in /health or logs;
    ``least`` is the smallest value of a number."""
    metadata = {"help": help, "choices": choices, "secret": secret, "least": least}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint, and how it is loaded."""

    model: str | None = option(None, "checkpoint directory or hub id; none: the built-in demo")
    revision: str | None = option(None, "hub revision: branch, tag or commit")
    download_dir: str | None = option(None, "where hub checkpoints are kept")
    dtype: str = option(
        "auto",
        "weights and activations; auto: the checkpoint's own, or float32 on a CPU that has no "
        "arithmetic in that one",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    device: str = option("auto", "cpu, cuda, cuda:N; auto takes CUDA where there is one")
    threads: int = option(0, "CPU threads for tensor work; 0: all cores but one")

    @property
    def num_threads(self) -> int:
        """Threads for tensor work. By default one core is left to the event loop: threads that
        wait for each other while it runs cost more than they give."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) - 1)


@dataclass(frozen=True)
class RpcConfig:
    """Where an internal service listens, and how it leaves."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(0, "port to listen on; 0 takes a free one and prints it")
    advertise: str | None = option(None, "host:port that other services reach this one at")
    drain_timeout_s: float = option(15.0, "seconds that running work gets after SIGTERM")
    parent_pid: int = option(0, "end when this process is gone; set by `opticnerve up`")


@dataclass(frozen=True)
class StoreConfig:
    """Where embeddings are kept."""

    store: str = option(
        "shm://", "memory://, shm://[dir][?capacity=], redis:// or rediss://", secret=True
    )
    store_ttl_s: int = option(3600, "seconds that Redis keeps an embedding", least=1)


@dataclass(frozen=True)
class TelemetryConfig:
    log_level: str = option("info", "log level", choices=("debug", "info", "warning", "error"))
    metrics_port: int = option(
        -1, "port of /metrics; 0 takes a free one, -1: none of its own", least=-1
    )


@dataclass(frozen=True)
class EncoderConfig:
    """`opticnerve encoder`"""

    model: ModelConfig = ModelConfig()
    rpc: RpcConfig = RpcConfig()
    store: StoreConfig = StoreConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    max_batch_patches: int = option(0, "patches of one forward pass; 0: sized from the device")
    max_queue_patches: int = option(0, "patches waiting before RESOURCE_EXHAUSTED; 0: 16 batches")
    max_item_bytes: int = option(20 * 2**20, "compressed size of one item")
    max_image_pixels: int = option(89_478_485, "pixels of one picture before it is a bomb")
    preprocess_workers: int = option(0, "threads that decode and resize; 0: one a core")


@dataclass(frozen=True)
class LLMConfig:
    """`opticnerve llm`"""

    model: ModelConfig = ModelConfig()
    rpc: RpcConfig = RpcConfig()
    store: StoreConfig = StoreConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    max_model_len: int = option(0, "prompt and output tokens; 0: the model's own")
    max_num_seqs: int = option(64, "sequences running at once", least=1)
    max_num_batched_tokens: int = option(2048, "tokens of one step", least=1)
    max_waiting: int = option(1024, "requests waiting before RESOURCE_EXHAUSTED", least=1)
    kv_cache_tokens: int = option(0, "tokens that the KV cache holds; 0: sized from memory")
    no_prefix_caching: bool = option(False, "do not share KV pages between requests")
    max_logprobs: int = option(20, "largest logprobs of a request")
    attention: str = option("auto", "attention backend", choices=("auto", "sdpa"))
    engine: str = option("thread", "where the engine lives", choices=("thread", "process"))
    embedding_wait_ms: int = option(30_000, "how long a sequence waits for embeddings")


@dataclass(frozen=True)
class GatewayConfig:
    """`opticnerve gateway`"""

    model: ModelConfig = ModelConfig()
    store: StoreConfig = StoreConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    host: str = option("", "address to listen on; default 127.0.0.1, with API keys 0.0.0.0")
    port: int = option(8000, "port to listen on; 0 takes a free one and prints it")
    parent_pid: int = option(0, "end when this process is gone; set by `opticnerve up`")
    drain_timeout_s: float = option(15.0, "seconds that running requests get after SIGTERM")
    encoder_addresses: tuple[str, ...] = option((), "encoders: host:port or dns:///name:port")
    llm_addresses: tuple[str, ...] = option((), "LLM workers: host:port or dns:///name:port")
    served_model_name: tuple[str, ...] = option(
        (), "names that requests may use, * for any; default: the directory's name and `model`"
    )
    api_key_file: str | None = option(None, "file of keys, one `name: key` or `key` a line")
    public_models: bool = option(False, "/v1/models needs no key")
    cors_origins: tuple[str, ...] = option((), "origins that browsers may call from")
    chat_template: str | None = option(None, "file or text that replaces the model's template")
    generation_config: str = option(
        "auto", "sampling defaults: auto (the model's), neutral, or a directory"
    )
    ignore_unknown_fields: bool = option(False, "warn about unknown fields instead of a 400")
    max_images: int = option(10, "pictures of one request")
    min_pixels: int = option(0, "resized pictures have at least so many pixels; 0: the model's")
    max_pixels: int = option(0, "resized pictures have at most so many pixels; 0: the model's")
    max_image_pixels: int = option(89_478_485, "pixels of one picture before it is a bomb")
    max_media_bytes: int = option(20 * 2**20, "compressed size of one item")
    max_request_bytes: int = option(64 * 2**20, "size of one HTTP request body")
    media_timeout_s: float = option(10.0, "seconds to fetch one item")
    media_redirects: int = option(3, "redirects followed for one item")
    allow_remote_media: bool = option(True, "http and https media URLs are fetched")
    allowed_media_domains: tuple[str, ...] = option((), "domains to fetch from; none: any public")
    allow_private_media: bool = option(False, "fetch from private and loopback addresses too")
    allowed_media_root: str | None = option(None, "directory under which file:// is read")
    max_logprobs: int = option(20, "largest logprobs of a request")
    max_concurrent_requests: int = option(512, "requests in flight before 429")
    max_bytes_in_flight: int = option(2**30, "bytes that requests may hold before 429")
    request_timeout_s: float = option(600.0, "deadline of one request, end to end")
    worker_wait_s: float = option(120.0, "seconds that a request waits while no worker is up")
    encode_timeout_s: float = option(120.0, "deadline of one encode call")


@dataclass(frozen=True)
class UpConfig:
    """`opticnerve up`; every other flag goes to the services that know it."""

    encoders: int = option(1, "encoder processes", least=1)
    llms: int = option(1, "LLM processes", least=1)
    encoder_devices: tuple[str, ...] = option((), "CUDA devices of the encoders, shared in turn")
    llm_devices: tuple[str, ...] = option((), "CUDA devices of the LLM workers, shared in turn")
    start_timeout_s: float = option(600.0, "seconds that a child gets to become healthy")
    max_restarts: int = option(5, "crashes of one child within a minute before giving up")


@dataclass(frozen=True)
class Option:
    """One leaf field of a configuration, as flag and environment variable."""

    name: str
    path: tuple[str, ...]  # Names of the dataclass fields that lead to it.
    annotation: Any
    default: Any
    help: str
    choices: tuple[str, ...] | None
    secret: bool
    least: int

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def is_bool(self) -> bool:
        return self.annotation is bool

    def to_arguments(self, value: Any) -> list[str]:
        """The command-line arguments that give this option ``value``."""
        if self.is_bool and self.name.startswith("no_"):
            return [self.flag] if value else []
        if self.is_bool:
            return [self.flag if value else "--no-" + self.flag[2:]]
        return [self.flag, ",".join(value) if isinstance(value, tuple) else str(value)]

    def parse(self, text: str) -> Any:
        """The value that ``text`` means. Raises ValueError."""
        kind = _plain_type(self.annotation)
        if kind is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if kind is bool:
            lowered = text.strip().lower()
            if lowered in ("1", "true", "yes", "on"):
                return True
            if lowered in ("0", "false", "no", "off"):
                return False
            raise ValueError(f"{text!r} is neither true nor false")
        value = kind(text)
        if self.choices and value not in self.choices:
            raise ValueError(f"{text!r} is none of {', '.join(self.choices)}")
        if kind in (int, float) and not value >= self.least:  # Not a number is not either.
            raise ValueError(f"{text!r} is not a number from {self.least} up")
        return value


def _plain_type(annotation: Any) -> Any:
    """``int`` for ``int | None``; ``tuple`` for ``tuple[str, ...]``."""
    if isinstance(annotation, types.UnionType):
        annotation = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return typing.get_origin(annotation) or annotation


def options(cls: type, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """Every leaf option of a configuration dataclass, in order."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        annotation = hints[item.name]
        if dataclasses.is_dataclass(annotation):
            yield from options(typing.cast(type, annotation), (*path, item.name))
            continue
        yield Option(
            name=item.name,
            path=(*path, item.name),
            annotation=annotation,
            default=item.default,
            help=item.metadata["help"],
            choices=item.metadata["choices"],
            secret=item.metadata["secret"],
            least=item.metadata["least"],
        )


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """Adds a flag for every option that the parser does not know yet; MODEL is positional."""
    known = {action.dest for action in parser._actions}
    for item in options(cls):
        if item.name in known:
            continue
        if item.name == "model":
            parser.add_argument("model", nargs="?", default=None, help=item.help)
            continue
        text = item.help + ("" if item.default in (None, "", ()) else f" (default: {item.default})")
        kwargs: dict[str, Any] = {
            "default": None,
            "help": text.replace("%", "%%"),
            "dest": item.name,
        }
        if item.is_bool:
            action: Any = (
                "store_true" if item.name.startswith("no_") else argparse.BooleanOptionalAction
            )
            parser.add_argument(item.flag, action=action, **kwargs)
        else:
            parser.add_argument(
                item.flag,
                type=_argument_type(item),
                choices=item.choices,
                metavar=None if item.choices else item.name.rsplit("_", 1)[-1].upper(),
                **kwargs,
            )


def _argument_type(item: Option) -> Any:
    def parse(text: str) -> Any:
        try:
            return item.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parse.__name__ = _plain_type(item.annotation).__name__  # argparse shows it in its message.
    return parse


def build(
    cls: type[C], given: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> C:
    """A configuration from parsed flags (None: not given) and the environment.

    Raises ConfigError for a variable that does not parse.
    """
    environment = os.environ if environment is None else environment
    values: dict[tuple[str, ...], Any] = {}
    for item in options(cls):
        value = given.get(item.name)
        if value is None and item.variable in environment:
            try:
                value = item.parse(environment[item.variable])
            except ValueError as error:
                raise ConfigError(f"{item.variable}: {error}", param=item.variable) from error
        if value is not None:
            values[item.path] = value
    return _assemble(cls, values)


def _assemble(cls: type[C], values: Mapping[tuple[str, ...], Any]) -> C:
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        mine = {path[1:]: value for path, value in values.items() if path[0] == item.name}
        if () in mine:
            arguments[item.name] = mine[()]
        elif mine:
            arguments[item.name] = _assemble(hints[item.name], mine)
    return cls(**arguments)


def public_view(config: Any) -> dict[str, Any]:
    """Effective settings without secrets, flat, for /health and start-up logs."""
    shown: dict[str, Any] = {}
    for item in options(type(config)):
        value = config
        for name in item.path:
            value = getattr(value, name)
        shown[item.name] = "***" if item.secret and value != item.default else value
    return shown


def check_environment(environment: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for an ``OPTICNERVE_`` variable that no service knows."""
    environment = os.environ if environment is None else environment
    known = set(KNOWN_VARIABLES)
    for cls in (EncoderConfig, LLMConfig, GatewayConfig, UpConfig):
        known.update(item.variable for item in options(cls))
    unknown = sorted(name for name in environment if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ConfigError(f"unknown environment variable {', '.join(unknown)}", param=unknown[0])
