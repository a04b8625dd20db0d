"""Gemma 3's layout: every picture is a square of one size, and 256 tokens that see one another.

Reference: Gemma 3 Technical Report (arXiv 2503.19786). Pan and scan, which adds crops of long
pictures, is off in the published checkpoints and is not served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opticnerve.checkpoints.json_files import PixelSettings, positive, read_object, token_id
from opticnerve.errors import CheckpointError, UnsupportedCheckpoint
from opticnerve.media.plan import (
    NO_OVERRIDES,
    Grid,
    Modality,
    Overrides,
    Plan,
    Span,
    SpanAttention,
    Structure,
)
from opticnerve.models.family import Expansion, Rewrite
from opticnerve.models.llava.layout import check_item
from opticnerve.models.picture_sizes import picture_plan, processor_settings
from opticnerve.models.text_models import count_positions, text_sizes

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

BILINEAR = 2
# The image processor's values where its settings are missing or null.
USUAL_PIXELS = {"resample": BILINEAR, "image_mean": 0.5, "image_std": 0.5}
TOKEN_IDS = {"image_token": 262144, "boi_token": 255999, "eoi_token": 256000}


class Gemma3Layout:
    """Implements ``opticnerve.models.family.Layout``.

    Templates write the token that begins a picture. The processor adds the placeholders and the
    token that ends a picture, with an empty line before and after all of them.
    """

    family = "gemma3"
    position_dims = 1
    deepstack_levels = 0
    rewrite = Rewrite("boi_token", "\n\n{boi_token}{image_token}{eoi_token}\n\n")

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, vision = checkpoint.config, checkpoint.vision_config
        _check_architecture(checkpoint)
        self.hidden_size, self.max_positions = text_sizes(checkpoint, "gemma3_text")
        self.placeholder_ids = {
            name: token_id(config, f"{name}_id", token_id(config, f"{name}_index", usual))
            for name, usual in TOKEN_IDS.items()
        }
        self.item_token_ids = {Modality.IMAGE: self.placeholder_ids["image_token"]}
        self.image_size = positive(vision, "image_size", 224)
        self.patch_size = positive(vision, "patch_size", 16)
        self.num_tokens = positive(config, "mm_tokens_per_image", 256)
        side, kept = self.image_size // self.patch_size, int(self.num_tokens**0.5)
        if kept > side or side // (side // kept) != kept or kept**2 != self.num_tokens:
            raise CheckpointError(
                f"a picture of {side}x{side} patches cannot be pooled to {self.num_tokens} tokens "
                "(mm_tokens_per_image); the files are not of one checkpoint"
            )
        self._read_processor(checkpoint)

    def _read_processor(self, checkpoint: Checkpoint) -> None:
        settings = {k: v for k, v in processor_settings(checkpoint).items() if v is not None}
        if settings.get("do_pan_and_scan"):
            raise UnsupportedCheckpoint(
                "the image processor adds crops of long pictures (do_pan_and_scan), which is not "
                "supported; switch it off, as the published Gemma 3 has it"
            )
        self.pixels = PixelSettings.read({**USUAL_PIXELS, **settings})
        size = settings.get("size", {"height": 224, "width": 224})
        if size != {"height": self.image_size, "width": self.image_size}:
            raise CheckpointError(
                f"the image processor makes pictures of {size} but the vision tower takes "
                f"{self.image_size}x{self.image_size}; the files are not of one checkpoint"
            )
        processor = read_object(checkpoint.path / "processor_config.json") or {}
        written = positive(processor, "image_seq_length", 256)
        if processor and written != self.num_tokens:
            raise CheckpointError(
                f"the processor writes {written} tokens for a picture (image_seq_length) where the "
                f"model has {self.num_tokens}; the files are not of one checkpoint"
            )

    # ---- pictures

    def plan(self, structure: Structure, overrides: Overrides = NO_OVERRIDES) -> Plan:
        check_item(structure.displayed_size, overrides)
        side = self.image_size // self.patch_size
        return picture_plan(
            structure,
            (self.image_size, self.image_size),
            Grid(1, side, side),
            self.num_tokens,
            SpanAttention.BIDIRECTIONAL,
        )

    def expand(self, plan: Plan) -> Expansion:
        """One run of placeholders; ``rewrite`` has put the tokens around it."""
        return Expansion.of_rows(self.item_token_ids[plan.modality], plan.num_tokens)

    # ---- positions

    def positions(self, num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
        """int64 [1, num_tokens], from 0."""
        return count_positions(num_tokens, spans)

    # ---- identity

    def settings(self) -> Mapping[str, Any]:
        return {
            "family": self.family,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "num_tokens": self.num_tokens,
            **asdict(self.pixels),
        }


def _check_architecture(checkpoint: Checkpoint) -> None:
    kind = checkpoint.vision_config.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise UnsupportedCheckpoint(
            f"this Gemma 3 checkpoint's vision tower is {kind!r}; siglip_vision_model is supported"
        )
    text = checkpoint.text_config
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise UnsupportedCheckpoint(
            f"this Gemma 3 checkpoint's language model is {text['model_type']!r}; gemma3_text is "
            "supported"
        )
    if text.get("use_bidirectional_attention"):
        raise UnsupportedCheckpoint(
            "this checkpoint's text attends in both directions (use_bidirectional_attention), so "
            "that it cannot generate"
        )
