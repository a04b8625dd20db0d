"""Engines of towers: built on this device, checked by their gate, timed against torch.

On a CPU onnxruntime stands in for the TensorRT libraries.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bench.gpu.checks import EXACT, HALF, Figures, Seen, Skipped, expect, relative, short
from bench.gpu.models import Room

MODELS = ("demo", "qwen2_5_vl", "llava")
REPEATED = 1e-2  # Most difference of a second call, since kernels may be compiled in between.
LIBRARIES = ("tensorrt", "tensorrt_rtx")


def tower_engines(room: Room) -> Seen:
    """Checks every library that is installed and runs on this device, for a model of each kind."""
    try:
        build: Any = import_module("encoder_service.engines.build")
    except ImportError as error:  # The bench needs less than the product.
        raise Skipped(f"engines need {error.name}") from error
    figures: Figures = {}
    obstacles = []
    for library in LIBRARIES if room.on_cuda else ("onnx",):
        for model in MODELS if room.on_cuda else MODELS[:1]:
            try:
                figures[f"{library} {model}"] = _engine(room, build, library, model)
            except build.ConfigError as error:  # Not installed, or not for this device.
                obstacles.append(f"{library}: {error.message}")
                break
    if not figures:
        raise Skipped("; ".join(obstacles))
    worst = min(each["cosine"] for each in figures.values())
    said = [f"{len(figures)} engines, cosine {worst:.6f} at worst", *obstacles]
    return Seen("; ".join(said), figures)


def _engine(room: Room, build: Any, library: str, model: str) -> Figures:
    """Builds an engine, opens it as an encoder does, and compares. Raises UnusableEngine if the
    gate refuses it."""
    from encoder_service.model import open_model
    from opticnerve.config import EncoderConfig, ModelConfig

    dtype = HALF if room.on_cuda else EXACT
    directory = room.directory / f"engine-{library}-{model}"
    config = ModelConfig(model=str(room.checkpoint(model)), device=str(room.device))
    settings = build.BuildSettings(config, library, short(dtype), (), ())
    made = build.EngineBuild(settings).run(directory)
    expect(made.parity is not None, "the build measured nothing on a device that it builds for")
    served = open_model(EncoderConfig(model=config, vision_engine=str(directory)))
    split = room.split(model, dtype)
    pictures = [split.picture(size, seed) for seed, size in enumerate(room.sizes.pictures)]
    batch = [each.pixels for each in pictures], [each.plan for each in pictures]
    try:
        first, again = served.backend.encode(*batch), served.backend.encode(*batch)
        for one, other in zip(first, again, strict=True):
            error = relative(other["rows"], one["rows"])
            expect(error <= REPEATED, f"the second call's rows differ by {error:.1e}")
        return {
            "cosine": min(each.distance.cosine for each in made.parity),
            "ms": room.median_ms(lambda: served.backend.encode(*batch), repeats=3, warm=1),
            "torch_ms": room.median_ms(lambda: split.backend.encode(*batch), repeats=3, warm=1),
        }
    finally:
        served.backend.close()
