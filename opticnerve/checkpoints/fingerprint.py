"""Fingerprints: digests of what a worker's results depend on, 64 hex digits.

An encoder's covers everything that decides a row: configuration, processor settings, every byte of
the tower's and projector's tensors, output dtype, backend and precision.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from opticnerve.content_keys import hash_parts
from opticnerve.models.family import wanted
from opticnerve.models.registry import find_family, make_layout
from opticnerve.tensors.dtypes import dtype_name

if TYPE_CHECKING:
    import torch

    from opticnerve.checkpoints.checkpoint import Checkpoint

SCHEME = "opticnerve-fingerprint-2"


def encoder_fingerprint(
    checkpoint: Checkpoint, dtype: torch.dtype, backend: str, precision: str | None = None
) -> str:
    """An encoder's fingerprint. Encoders with equal ones give equal rows, within rounding.

    ``dtype``: the rows'. ``precision``: the backend's, if it differs.
    """
    settings = make_layout(checkpoint).settings()
    return hash_parts(
        SCHEME,
        "encoder",
        _canonical(checkpoint.config),
        _canonical(checkpoint.processor_config),
        _canonical(settings),
        checkpoint.weights_digest(wanted(find_family(checkpoint.config).vision_keys)),
        dtype_name(dtype),
        backend,
        precision or dtype_name(dtype),
    )


def language_fingerprint(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """An LLM worker's fingerprint. It covers the weights as ``Checkpoint.pair_id`` does."""
    config = _canonical(checkpoint.config)
    return hash_parts(SCHEME, "llm", config, checkpoint.pair_id, dtype_name(dtype))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{value!r} cannot be part of a fingerprint")
