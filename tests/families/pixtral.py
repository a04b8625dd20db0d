"""Pixtral: a LLaVA by its config.json."""

from __future__ import annotations

from typing import Any

from tests.families import text_sizes
from tests.families.llava import Llava
from tests.families.mistral3 import BOS, IMAGE, WIDE, PixtralSample, tower_sizes


class Pixtral(PixtralSample):
    name = "pixtral"
    architecture = "LlavaForConditionalGeneration"
    patch_size = 20
    merge_size = 1

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import LlavaConfig, MistralConfig, PixtralVisionConfig

        sizes = text_sizes() | {"bos_token_id": BOS, "tie_word_embeddings": tied} | WIDE
        tower = tower_sizes() | {"patch_size": self.patch_size, "hidden_act": "silu"}
        return LlavaConfig(
            text_config=MistralConfig(**(sizes | {"sliding_window": None} | text)),
            vision_config=PixtralVisionConfig(**(tower | vision)),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_seq_length=1,
            tie_word_embeddings=tied,
        )

    old_config = Llava.old_config


SAMPLES = (Pixtral(),)
