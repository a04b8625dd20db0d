"""Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from tests.families import mrope_sizes, special_ids
from tests.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    processor_class = "qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor"

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import Qwen2_5_VLConfig

        tower = {
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "patch_size": 14,
            "window_size": 56,  # Two merged patches a side.
            "fullatt_block_indexes": [1, 3],
        }
        text = mrope_sizes() | {"tie_word_embeddings": tied} | text
        return Qwen2_5_VLConfig(
            text_config=text,
            vision_config=tower | {"out_hidden_size": text["hidden_size"]} | vision,
            **special_ids(tied),
        )


SAMPLES = (Qwen25VL(),)
