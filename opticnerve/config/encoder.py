"""``opticnerve encoder``"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opticnerve.config import shared
from opticnerve.config.options import Group, option
from opticnerve.errors import ConfigError

SIDECAR = "engine.json"  # The description in an engine's directory.
ENGINE_BACKENDS = ("tensorrt", "tensorrt_rtx", "onnx")

_tower = partial(option, group=Group.TOWER)
_batches = partial(option, group=Group.BATCHES)
_pictures = partial(option, group=Group.PICTURES)


def check_engine_directory(text: str) -> None:
    """Raises ValueError for a directory without an engine."""
    if not (Path(text) / SIDECAR).is_file():
        raise ValueError(f"{text} holds no {SIDECAR}")


@dataclass(frozen=True)
class EncoderConfig:
    """Settings of an encoder."""

    model: shared.ModelConfig = shared.ModelConfig()
    backend: str = _tower(
        "auto",
        "library that runs the vision tower; auto: that of --vision-engine, or torch without one",
        choices=("auto", "torch", *ENGINE_BACKENDS),
    )
    vision_engine: str | None = _tower(
        None,
        "directory of an engine of the vision tower, from `opticnerve engine build`",
        metavar="DIR",
        expects=f"the directory of an engine, which holds {SIDECAR}",
        check=check_engine_directory,
    )
    beyond_buckets: str = _tower(
        "torch",
        "pictures larger than the engine's largest bucket: torch encodes them, for which the "
        "encoder keeps the tower's weights; refuse: they are refused",
        choices=("torch", "refuse"),
    )
    audit_share: float = _tower(
        0.0,
        "share of the pictures, such as 0.01, that the torch tower encodes a second time, each "
        "alone; rows that differ are logged and counted in opticnerve_items_audited_total",
        metavar="SHARE",
        maximum=1,
    )
    rpc: shared.RpcConfig = shared.RpcConfig()
    store: shared.StoreConfig = shared.StoreConfig()
    max_batch_patches: int = _batches(0, "patches in one forward pass; 0: sized from the device")
    max_queue_patches: int = _batches(
        0, "patches that may wait before items are refused; 0: 16 batches"
    )
    preprocess_workers: int = _batches(
        0, "threads that decode and resize pictures; 0: one per core"
    )
    max_item_bytes: int = _pictures(
        20 * 2**20, "compressed size of one picture, at the encoder", size=True
    )
    max_image_pixels: int = shared.MAX_IMAGE_PIXELS()
    max_decode_passes: int = shared.MAX_DECODE_PASSES()
    max_decode_bytes: int = _pictures(
        0,
        "memory for decoding pictures concurrently, a quarter of it for light ones; a single "
        "picture always fits. 0: 256MiB per preprocess worker, at least 2GiB",
        size=True,
    )
    decode_timeout_s: float = _pictures(30.0, "CPU time for decoding one heavy picture")
    telemetry: shared.TelemetryConfig = shared.TelemetryConfig()

    def __post_init__(self) -> None:
        """Raises ConfigError for an audit without the torch tower, which it needs."""
        if self.audit_share and self.vision_engine and self.beyond_buckets == "refuse":
            raise ConfigError(
                "--audit-share compares with the torch tower, which --beyond-buckets refuse does "
                "not keep: use --beyond-buckets torch",
                param="audit_share",
            )
