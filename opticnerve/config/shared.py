"""The parts of configurations that several services have, and options that two of them have."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opticnerve import addresses
from opticnerve.config.options import Group, option
from opticnerve.errors import ConfigError

_model = partial(option, group=Group.MODEL)
_address = partial(option, group=Group.ADDRESS)
_store = partial(option, group=Group.STORE)
_telemetry = partial(option, group=Group.TELEMETRY)

MIN_IMAGE_PIXELS = 64 * 64  # At its start an encoder decodes a picture of this size.
MIN_DECODE_PASSES = 2**20  # What the markers of an ordinary picture may take.

DRAIN_HELP = "how long running requests may go on after SIGTERM or Ctrl-C; a second one ends them"
PARENT_HELP = "end when this process, the parent, has ended"
TOKEN_HELP = (
    "file of the token that the gateway's and its workers' calls to each other carry: one secret "
    "for all of them, such as `openssl rand -hex 32` makes; `up` makes its own"
)
PASSES_HELP = (
    "work of decoding one picture, in pixels decoded once, read from its structure: a "
    "progressive JPEG's is its pixels times its scans; more is refused"
)
PIXELS_HELP = "pixels of one picture as it comes; larger ones are refused"
_picture = partial(option, group=Group.PICTURES)
MAX_IMAGE_PIXELS = partial(_picture, 89_478_485, PIXELS_HELP, minimum=MIN_IMAGE_PIXELS)
MAX_DECODE_PASSES = partial(_picture, 2**30, PASSES_HELP, minimum=MIN_DECODE_PASSES)
MAX_LOGPROBS = partial(option, 20, "largest `top_logprobs` of a request", group=Group.LIMITS)


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
    )

    @property
    def num_threads(self) -> int:
        """Threads for tensor work. They sleep while there is none (``cli.commands``), so the event
        loop needs no core of its own."""
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class RpcConfig:
    """Where an internal service listens, and how it leaves."""

    host: str = _address(
        "127.0.0.1", "where to listen; 0.0.0.0: on every interface", metavar="HOST"
    )
    port: int = _address(0, "port to listen on; 0: a free one, which is printed", maximum=65535)
    advertise: str | None = _address(
        None,
        "the address that other services, gateways too, reach this one at; needed where --host is "
        "0.0.0.0 and they run on other machines",
        metavar="HOST:PORT",
        expects="HOST:PORT that the other services call, such as 10.0.0.5:7001: one machine's name "
        "or IP and a port from 1 to 65535, no wildcard such as 0.0.0.0",
        check=addresses.check_advertised,
    )
    rpc_token_file: str | None = _address(None, TOKEN_HELP, metavar="FILE")
    insecure: bool = _address(
        False,
        "listen beyond this machine without --rpc-token-file, because the network keeps out who "
        "may not use this worker",
    )
    reflection: bool = _address(
        False, "answer gRPC's reflection, by which tools like grpcurl see what can be called"
    )
    drain_timeout_s: float = _address(15.0, DRAIN_HELP)
    parent_pid: int = _address(0, PARENT_HELP, metavar="PID", hidden=True)

    def __post_init__(self) -> None:
        """Raises ConfigError if anyone on the network could use the worker and ``insecure`` does
        not allow it."""
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
    store_ttl_s: int = _store(3600, "how long Redis keeps an embedding", minimum=1)

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
    """Logs and metrics."""

    log_level: str = _telemetry(
        "info", "the least that is logged", choices=("debug", "info", "warning", "error")
    )
    log_format: str = _telemetry(
        "text", "lines for people, or one JSON object a line", choices=("text", "json")
    )
    metrics_port: int = _telemetry(
        -1,
        "port of its own for Prometheus' /metrics; 0: a free one, -1: none",
        minimum=-1,
        maximum=65535,
    )
    metrics_host: str = _telemetry(
        "",
        "where --metrics-port listens; default: where the service does, at --host",
        metavar="HOST",
    )
