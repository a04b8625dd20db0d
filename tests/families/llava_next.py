"""LLaVA-NeXT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.families import text_sizes
from tests.families.llava import BOS, IMAGE, Llava

if TYPE_CHECKING:
    import torch

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


class LlavaNext(Llava):
    name = "llava_next"
    architecture = "LlavaNextForConditionalGeneration"
    image_processor_class = "llava_next.image_processing_pil_llava_next:LlavaNextImageProcessorPil"
    processor_class = "llava_next.processing_llava_next:LlavaNextProcessor"

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

        tower = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 32,
        }
        sizes = text_sizes() | {"bos_token_id": BOS, "tie_word_embeddings": tied}
        return LlavaNextConfig(
            text_config=MistralConfig(**(sizes | {"sliding_window": None} | text)),
            vision_config=CLIPVisionConfig(**(tower | vision)),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=tied,
        )

    def old_name(self, name: str) -> str:
        return super().old_name(name).replace("model.image_newline", "image_newline")

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        return {
            **super().image_settings(layout, config, settings),
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "LlavaNextProcessor",
            "do_pad": True,
            "image_grid_pinpoints": PINPOINTS,
        }

    def processor_settings(self, config: Any) -> Any:
        return super().processor_settings(config) | {"processor_class": "LlavaNextProcessor"}

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        return super().tower_tensors(model) | {"image_newline": model.model.image_newline}


SAMPLES = (LlavaNext(),)
