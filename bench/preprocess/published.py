"""Checkpoints with the widths and the processor settings of published models, shallow, of random
weights: in the time of a picture only the depth is not the published one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import make_checkpoint


@dataclass(frozen=True)
class Published:
    """``text`` and ``vision``: sizes as ``make_checkpoint`` takes them; ``depth``: the name of the
    tower's number of layers; ``settings``: the image processor's."""

    model: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    depth: str = "depth"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def write(self, family: str, depth: int, directory: Path) -> Path:
        """Writes a checkpoint whose tower has ``depth`` layers; its path."""
        return make_checkpoint(
            family,
            directory / family,
            vision={**self.vision, self.depth: depth},
            text={**self.text, **SHALLOW},
            **self.settings,
        )


SHALLOW = {"num_hidden_layers": 1, "intermediate_size": 256}  # Decoders, which nothing here runs.
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN = {"min_pixels": 56 * 56, "max_pixels": 16_384 * 28 * 28}

PUBLISHED: Mapping[str, Published] = {
    "qwen2_vl": Published(
        "Qwen2-VL-2B",
        {"embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
        {"hidden_size": 1536, "num_attention_heads": 12, "rope_parameters": MROPE},
        settings=QWEN,
    ),
    "qwen2_5_vl": Published(
        "Qwen2.5-VL-3B",
        {
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "window_size": 112,
            "fullatt_block_indexes": [3],
        },
        {"hidden_size": 2048, "num_attention_heads": 16, "rope_parameters": MROPE},
        settings=QWEN,
    ),
    "llava": Published(
        "LLaVA-1.5-7B",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "image_size": 336,
        },
        {"hidden_size": 4096, "num_attention_heads": 32},
        depth="num_hidden_layers",
    ),
}
"""By the name of a test sample. A family without an entry is not measured."""
