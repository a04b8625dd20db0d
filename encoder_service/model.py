"""Opens a checkpoint's vision half on the backend that the settings choose."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import torch

from encoder_service.backends.base import VisionModel
from encoder_service.backends.torch_backend import TorchBackend
from encoder_service.engines.sidecar import Sidecar
from encoder_service.pictures.largest_picture import shrink
from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.fingerprint import encoder_fingerprint
from opticnerve.config import EncoderConfig
from opticnerve.errors import ConfigError
from opticnerve.models.registry import load_tower, make_layout, make_preprocessor


def open_model(settings: EncoderConfig) -> VisionModel:
    """The vision half of a checkpoint, on its device. Raises StartupError."""
    torch.set_num_threads(settings.model.num_threads)
    checkpoint = Checkpoint.configured(settings.model, "encoder")
    checkpoint.read_ahead()
    if settings.vision_engine is not None:
        return _open_engine(checkpoint, settings, Path(settings.vision_engine))
    if settings.backend not in ("auto", "torch"):
        words = ["opticnerve", "engine", "build", *filter(None, [settings.model.model])]
        command = shlex.join([*words, "--backend", settings.backend, "-o", "DIR"])
        raise ConfigError(
            f"--backend {settings.backend} needs --vision-engine DIR, which `{command}` makes",
            param="vision_engine",
        )
    return _open_torch(checkpoint, settings)


def _open_torch(checkpoint: Checkpoint, settings: EncoderConfig) -> VisionModel:
    layout = make_layout(checkpoint)
    tower = load_tower(checkpoint, settings.model.dtype, settings.model.device)
    preprocess = make_preprocessor(checkpoint, layout)
    backend = TorchBackend(tower, preprocess, partial(shrink, layout))
    return VisionModel(
        checkpoint.name,
        checkpoint.family,
        checkpoint.pair_id,
        encoder_fingerprint(checkpoint, tower.dtype, backend.name),
        layout,
        backend,
    )


def _open_engine(checkpoint: Checkpoint, settings: EncoderConfig, directory: Path) -> VisionModel:
    from encoder_service.engines.opening import open_engine  # Imports what only engines need.

    sidecar = Sidecar.read(directory)
    if settings.backend not in ("auto", sidecar.backend):
        raise ConfigError(
            f"--backend is {settings.backend}, and the engine in {directory} is for "
            f"{sidecar.backend}",
            param="backend",
        )
    if settings.model.dtype not in ("auto", sidecar.precision):
        raise ConfigError(
            f"--dtype is {settings.model.dtype}, and the engine in {directory} computes in "
            f"{sidecar.precision}; leave --dtype out",
            param="dtype",
        )
    with_torch = settings.beyond_buckets == "torch"
    audited = settings.audit_share > 0
    engine = open_engine(
        directory, checkpoint, settings.model, with_torch=with_torch, audited=audited
    )
    return VisionModel(
        checkpoint.name,
        checkpoint.family,
        checkpoint.pair_id,
        engine.sidecar.fingerprint,
        engine.layout,
        engine.backend,
    )
