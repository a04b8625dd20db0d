"""Reads a checkpoint's JSON files, numbers in them and an image processor's pixel settings, with a
clear CheckpointError for what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opticnerve.errors import CheckpointError, UnsupportedCheckpoint

BICUBIC = 3
RESAMPLES = range(6)  # PIL.Image.Resampling.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class PixelSettings:
    """How 8-bit RGB becomes the tower's floats, in this order: resize, rescale, normalise."""

    resample: int = BICUBIC  # PIL.Image.Resampling: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic.
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PixelSettings:
        """Reads an image processor's settings, with Hugging Face's defaults. Raises
        CheckpointError."""
        if config.get("do_resize") is False:
            raise UnsupportedCheckpoint("the image processor has do_resize off; it must be on")
        resample = integer(config, "resample", BICUBIC)
        if resample not in RESAMPLES:
            raise CheckpointError(_complaint("resample", resample, "a number from 0 to 5"))
        std = _triple(config, "image_std", CLIP_STD)
        if min(std) <= 0:
            raise CheckpointError(_complaint("image_std", list(std), "positive numbers"))
        return cls(
            resample=resample,
            do_rescale=bool(config.get("do_rescale", True)),
            rescale_factor=number(config, "rescale_factor", 1 / 255),
            do_normalize=bool(config.get("do_normalize", True)),
            mean=_triple(config, "image_mean", CLIP_MEAN),
            std=std,
        )


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in ``file``; None when there is no such file. Raises CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read: it is not valid JSON; fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} cannot be read: it holds no JSON object; fetch it again")
    return value


def integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """``config[name]`` as an int; ``default`` when absent or null. Raises CheckpointError."""
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(_complaint(name, value, "a whole number"))
    return value


def positive(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = integer(config, name, default)
    if value < 1:
        raise CheckpointError(_complaint(name, value, "a positive number"))
    return value


def token_id(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = integer(config, name, default)
    if value < 0:
        raise CheckpointError(_complaint(name, value, "a token's id"))
    return value


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """``config[name]`` as a finite float; ``default`` when absent or null. Raises
    CheckpointError."""
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(_complaint(name, value, "a number"))
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise CheckpointError(_complaint(name, value, "a finite number"))
    return found


def _triple(config: Mapping[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, (int, float)):
        value = [value] * 3
    if not isinstance(value, list) or len(value) != 3:
        raise CheckpointError(_complaint(name, value, "three numbers"))
    return tuple(number({name: item}, name) for item in value)


def _complaint(name: str, value: Any, wanted: str) -> str:
    if value is None:
        return f"the checkpoint's configuration lacks {name}; fetch its JSON files again"
    return f"the checkpoint's configuration has {name} = {value!r}, which should be {wanted}"
