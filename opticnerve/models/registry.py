"""Finds the family that serves a checkpoint, and makes its parts.

Every folder of ``opticnerve/models`` that declares a ``FAMILY`` is one. Nothing here imports torch
until a tower or a language model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from opticnerve import models
from opticnerve.errors import UnsupportedCheckpoint
from opticnerve.models.family import Family

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.family import LanguageModel, Layout, Preprocessor, Tower
    from opticnerve.models.towers.graph import TowerGraph


@cache
def families() -> Mapping[str, Family]:
    """Every declared family, by each ``model_type`` of config.json that it serves."""
    found: dict[str, Family] = {}
    for module in iter_modules(models.__path__):
        if not module.ispkg:
            continue
        family: Any = getattr(import_module(f"{models.__name__}.{module.name}"), "FAMILY", None)
        for model_type in family.model_types if isinstance(family, Family) else ():
            if model_type in found:
                raise RuntimeError(f"two families declare the model_type {model_type!r}")
            found[model_type] = family
    return found


def make_layout(checkpoint: Checkpoint) -> Layout:
    """Sizing, placeholders and positions of ``checkpoint``. Raises CheckpointError."""
    family = find_family(checkpoint.config)
    layout: Layout = family.load_part(family.layout)(checkpoint)
    return layout


def make_preprocessor(checkpoint: Checkpoint, layout: Layout) -> Preprocessor:
    """From a decoded picture to the tower's input; ``layout`` is the checkpoint's."""
    family = find_family(checkpoint.config)
    preprocessor: Preprocessor = family.load_part(family.preprocess)(layout)
    return preprocessor


def load_tower(checkpoint: Checkpoint, dtype: Any, device: Any) -> Tower:
    """Vision tower and projector of ``checkpoint`` on ``device``; ``dtype`` and ``device`` as
    ``--dtype`` and ``--device`` have them, or torch's. Raises CheckpointError, ConfigError."""
    family = find_family(checkpoint.config)
    spec = family.load_part(family.tower)(checkpoint)
    tower: Tower = spec.load(checkpoint, family.vision_keys, dtype, device)
    return tower


def load_graph(checkpoint: Checkpoint, dtype: Any, device: Any) -> TowerGraph:
    """The vision half of ``checkpoint`` as a graph that can be exported; arguments and errors as
    ``load_tower`` has them. Raises UnsupportedCheckpoint for a family whose tower cannot be."""
    family = find_family(checkpoint.config)
    if not family.graph:
        raise UnsupportedCheckpoint(
            f"{family.title} has no tower that can be exported; serve it with --backend torch"
        )
    graph: TowerGraph = family.load_part(family.graph)(load_tower(checkpoint, dtype, device))
    return graph


def load_language(checkpoint: Checkpoint, dtype: Any, device: Any, attention: str) -> LanguageModel:
    """Language model and head of ``checkpoint`` on ``device``. ``attention`` names a function in
    transformers' attention interface. Raises CheckpointError, ConfigError."""
    family = find_family(checkpoint.config)
    spec = family.load_part(family.decoder)(checkpoint)
    language: LanguageModel = spec.load(checkpoint, family.language_keys, dtype, device, attention)
    return language


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that serves ``config``, a checkpoint's config.json. Raises UnsupportedCheckpoint,
    which says what was found and what is served."""
    family = families().get(str(config.get("model_type")))
    if family is None:
        raise UnsupportedCheckpoint(f"this checkpoint {_obstacle(config)}; {_supported()}")
    if "quantization_config" in config:
        method = _mapping(config["quantization_config"]).get("quant_method", "unknown")
        raise UnsupportedCheckpoint(
            f"this checkpoint's weights are quantized ({method}), which is not supported; "
            "serve the unquantized checkpoint that it was made from"
        )
    return family


def _obstacle(config: Mapping[str, Any]) -> str:
    """Why no family serves ``config``; whole classes of models are out of scope."""
    kind, found = str(config.get("model_type")), _found(config)
    if "auto_map" in config:
        return f"brings its own model code (auto_map; {found}), and remote code is never run"
    if kind.startswith("mllama") or "cross_attention_layers" in _mapping(config.get("text_config")):
        return (
            f"has a decoder that reads pictures by cross-attention ({found}), not as embeddings "
            "among its tokens, which cannot be served here"
        )
    if any(key in config for key in ("audio_config", "audio_encoder_config", "thinker_config")):
        return f"takes audio ({found}), which is not supported"
    if "vision_config" not in config and kind != "None":
        return f"has no vision tower ({found})"
    return f"has {found}"


def _found(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    listed = ", ".join(map(str, names)) if isinstance(names, list) and names else "none"
    return f"model_type {config.get('model_type')!r}, architectures: {listed}"


def _supported() -> str:
    return "supported are " + ", ".join(
        f"{family.title} (model_type {model_type})" for model_type, family in families().items()
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
