"""LLaVA-OneVision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.families import tensors_of, text_sizes, write_tokenizer
from tests.families.llava_next import LlavaNext

if TYPE_CHECKING:
    import torch

IMAGE, VIDEO = 634, 635
EDGES = (42, 84, 126, 168)
PINPOINTS = [[high, wide] for high in EDGES for wide in EDGES]

TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] if part['type'] in ('image', 'image_url') %}{{ '<image>' }}\
{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}\
{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


class LlavaOnevision(LlavaNext):
    name = "llava_onevision"
    architecture = "LlavaOnevisionForConditionalGeneration"
    image_processor_class = (
        "llava_onevision.image_processing_pil_llava_onevision:LlavaOnevisionImageProcessorPil"
    )
    processor_class = "llava_onevision.processing_llava_onevision:LlavaOnevisionProcessor"

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

        tower = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 42,
            "patch_size": 14,
            "vision_use_head": False,
        }
        return LlavaOnevisionConfig(
            text_config=Qwen2Config(**(text_sizes() | {"tie_word_embeddings": tied} | text)),
            vision_config=SiglipVisionConfig(**(tower | vision)),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            tie_word_embeddings=tied,
        )

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        """As LLaVA's but for the ids of its placeholders."""
        return super().old_config(fields) | {"image_token_index": IMAGE}

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        return {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "do_pad": True,
            "image_grid_pinpoints": PINPOINTS,
            "size": {"height": side, "width": side},
        }

    def processor_settings(self, config: Any) -> Any:
        vision = config.vision_config
        return {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
            "vision_aspect_ratio": config.vision_aspect_ratio,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }

    def write_tokenizer(self, directory: Path) -> None:
        write_tokenizer(
            directory,
            {"<image>": IMAGE, "<video>": VIDEO},
            TEMPLATE,
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
            processor_class="LlavaOnevisionProcessor",
        )

    def process(self, processor: Any, text: str, images: list[Any]) -> dict[str, Any]:
        """Pictures of one prompt are given as such, as a chat template gives them."""
        return super().process(processor, text, [images] if images else [])

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        tower = {f"tower.{k}": v for k, v in tensors_of(model.model.vision_tower).items()}
        tower = {k: v for k, v in tower.items() if not k.startswith("tower.post_layernorm")}
        projector = tensors_of(model.model.multi_modal_projector)
        own = {"image_newline": model.model.image_newline}
        return tower | {f"projector.{k}": v for k, v in projector.items()} | own


SAMPLES = (LlavaOnevision(),)
