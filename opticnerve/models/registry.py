"""Which family serves a checkpoint, found by the ``model_type`` of its ``config.json``.

A family's files are imported when they are used: ``layout`` everywhere, ``vision`` in encoders,
``language`` in LLM workers. This module and every layout import no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from opticnerve.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.family import FamilyModule, Language, Layout, Tower

FAMILIES = {  # model_type of config.json -> folder of opticnerve/models.
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "llava": "llava",
}
FAMILY_NAMES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "llava": "LLaVA-1.5"}

_SUPPORTED = "supported are " + ", ".join(
    f"{name} (model_type {kind})" for kind, name in FAMILY_NAMES.items()
)


def family_of(config: Mapping[str, Any]) -> str:
    """The family's folder name. Raises UnsupportedCheckpoint: what was found, what is served."""
    _refuse_by_kind(config)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UnsupportedCheckpoint(f"this checkpoint has {_found(config)}; {_SUPPORTED}")
    if "quantization_config" in config:
        method = _mapping(config["quantization_config"]).get("quant_method", "unknown")
        raise UnsupportedCheckpoint(
            f"this checkpoint's weights are quantized ({method}), which is not supported; "
            "serve the unquantized checkpoint that it was made from"
        )
    return family


def _refuse_by_kind(config: Mapping[str, Any]) -> None:
    """Raises for whole classes of models that are out of scope, each with its reason."""
    kind = str(config.get("model_type"))
    text = _mapping(config.get("text_config"))
    if kind in FAMILIES:
        return
    if "auto_map" in config:
        raise UnsupportedCheckpoint(
            f"this checkpoint brings its own model code (auto_map; {_found(config)}), and remote "
            f"code is never run; {_SUPPORTED}"
        )
    if kind.startswith("mllama") or "cross_attention_layers" in text:
        raise UnsupportedCheckpoint(
            f"this checkpoint's decoder reads pictures by cross-attention ({_found(config)}), not "
            f"as embeddings among its tokens, which cannot be served here; {_SUPPORTED}"
        )
    if any(key in config for key in ("audio_config", "audio_encoder_config", "thinker_config")):
        raise UnsupportedCheckpoint(
            f"this checkpoint takes audio ({_found(config)}), which is not supported; {_SUPPORTED}"
        )
    if "vision_config" not in config and kind != "None":
        raise UnsupportedCheckpoint(
            f"this checkpoint has no vision tower ({_found(config)}); {_SUPPORTED}"
        )


def _found(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    listed = ", ".join(map(str, names)) if isinstance(names, list) and names else "none"
    return f"model_type {config.get('model_type')!r}, architectures: {listed}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _module(checkpoint: Checkpoint, part: str) -> FamilyModule:
    name = f"opticnerve.models.{family_of(checkpoint.config)}.{part}"
    return cast("FamilyModule", importlib.import_module(name))


def make_layout(checkpoint: Checkpoint) -> Layout:
    """Sizing, placeholders and positions of ``checkpoint``. No torch."""
    return _module(checkpoint, "layout").make_layout(checkpoint)


def load_tower(checkpoint: Checkpoint, dtype: Any, device: Any) -> Tower:
    """Vision tower and projector of ``checkpoint``, loaded and on ``device``."""
    return _module(checkpoint, "vision").load_tower(checkpoint, dtype, device)


def load_language(checkpoint: Checkpoint, dtype: Any, device: Any, attention: str) -> Language:
    """Language model and head of ``checkpoint``, loaded and on ``device``."""
    return _module(checkpoint, "language").load_language(checkpoint, dtype, device, attention)
