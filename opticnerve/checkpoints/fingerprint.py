"""Fingerprints: what a worker's results depend on, in 64 hex digits.

An encoder's covers everything that decides a row: configuration, processor settings, every byte of
the tower's and projector's tensors, output dtype, backend and precision.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from opticnerve.checkpoints.loader import wanted
from opticnerve.hashing import hash_parts
from opticnerve.models.registry import find_family, make_layout
from opticnerve.tensors.dtypes import dtype_name

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.family import Language, Tower

SCHEME = "opticnerve-fingerprint-2"


def fingerprint(
    checkpoint: Checkpoint, tower: Tower, backend: str, precision: str | None = None
) -> str:
    """An encoder's. Encoders with equal fingerprints give equal rows, within rounding.

    ``precision``: the backend's, where it differs from the output dtype.
    """
    dtype = dtype_name(tower.dtype)
    settings = make_layout(checkpoint).settings()
    return hash_parts(
        SCHEME,
        "encoder",
        _canonical(checkpoint.config),
        _canonical(checkpoint.processor_config),
        _canonical(settings),
        checkpoint.weights_digest(wanted(find_family(checkpoint.config).vision_keys)),
        dtype,
        backend,
        precision or dtype,
    )


def language_fingerprint(checkpoint: Checkpoint, language: Language) -> str:
    """An LLM worker's. Of the weights it covers what ``Checkpoint.pair_id`` covers."""
    dtype = dtype_name(language.dtype)
    return hash_parts(SCHEME, "llm", _canonical(checkpoint.config), checkpoint.pair_id, dtype)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{value!r} cannot be part of a fingerprint")
