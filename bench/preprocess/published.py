"""Shallow random checkpoints with the widths and the processor settings of published models, so
that a picture takes the published model's time except for the depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import make_checkpoint
from tests.families import samples


@dataclass(frozen=True)
class Published:
    """``vision``, ``text``, ``config``: arguments of ``make_checkpoint``. ``depth``: the name of
    the tower's number of layers. ``settings``: the image processor's. ``patch_size``: for samples
    with that attribute. ``was_before``: whether the family was served when floats were still made
    before the tower."""

    model: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    depth: str = "num_hidden_layers"
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    patch_size: int | None = None
    was_before: bool = False

    def write(self, family: str, depth: int, directory: Path) -> Path:
        """Writes a checkpoint whose tower has ``depth`` layers, and returns its path."""
        if self.patch_size is not None:
            samples()[family].patch_size = self.patch_size  # type: ignore[attr-defined]
        return make_checkpoint(
            family,
            directory / family,
            vision={**self.vision, self.depth: depth},
            text={**self.text, **SHALLOW},
            config={**self.config},
            **self.settings,
        )


SHALLOW = {"num_hidden_layers": 1, "intermediate_size": 256}  # Of decoders, which are not run here.
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN = {"min_pixels": 56 * 56, "max_pixels": 16_384 * 28 * 28}
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
}
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 384,
}
NEXT = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
EDGES = range(384, 2305, 384)
ONEVISION = {"image_grid_pinpoints": [[high, wide] for high in EDGES for wide in EDGES]}

PUBLISHED: Mapping[str, Published] = {
    "qwen2_vl": Published(
        "Qwen2-VL-2B",
        {"embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
        {"hidden_size": 1536, "num_attention_heads": 12, "rope_parameters": MROPE},
        depth="depth",
        settings=QWEN,
        was_before=True,
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
        depth="depth",
        settings=QWEN,
        was_before=True,
    ),
    "qwen3_vl": Published(
        "Qwen3-VL-4B",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1],
        },
        {"hidden_size": 2560, "num_attention_heads": 32},
        depth="depth",
        settings={"min_pixels": 256 * 256, "max_pixels": 4096 * 4096},
    ),
    "glm4v": Published(
        "GLM-4.1V-9B",
        {
            "hidden_size": 1536,
            "intermediate_size": 13_696,
            "num_heads": 12,
            "image_size": 336,
        },
        {"hidden_size": 4096, "num_attention_heads": 32},
        depth="depth",
        settings={"min_pixels": 112 * 112, "max_pixels": 6144 * 28 * 28},
    ),
    "idefics3": Published(
        "Idefics3-8B",
        SIGLIP | {"image_size": 364},
        {"hidden_size": 4096, "num_attention_heads": 32},
        settings={"size": {"longest_edge": 1456}},
    ),
    "internvl": Published(
        "InternVL3.5-4B",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "image_size": [448, 448],
        },
        {"hidden_size": 2560},
        settings={"max_patches": 12},
    ),
    "llava": Published(
        "LLaVA-1.5-7B",
        CLIP,
        {"hidden_size": 4096, "num_attention_heads": 32},
        was_before=True,
    ),
    "llava_next": Published(
        "LLaVA-NeXT-7B",
        CLIP,
        {"hidden_size": 4096, "num_attention_heads": 32},
        config=NEXT,
        settings=NEXT,
    ),
    "llava_onevision": Published(
        "LLaVA-OneVision-7B",
        SIGLIP,
        {"hidden_size": 3584, "num_attention_heads": 28},
        config=ONEVISION | {"vision_aspect_ratio": "anyres_max_9"},
        settings=ONEVISION,
    ),
    "mistral3": Published(
        "Mistral-Small-3.1-24B",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "image_size": 1540,
            "patch_size": 14,
        },
        {"hidden_size": 5120},
        patch_size=14,
    ),
    "pixtral": Published(
        "Pixtral-12B",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "image_size": 1024,
            "patch_size": 16,
        },
        {"hidden_size": 5120},
        patch_size=16,
    ),
    "smolvlm": Published(
        "SmolVLM2-2.2B",
        SIGLIP,
        {"hidden_size": 2048, "num_attention_heads": 32},
        config={"scale_factor": 3},
        settings={"size": {"longest_edge": 1536}},
    ),
}
"""By the name of a test sample. A family without an entry is not measured."""
