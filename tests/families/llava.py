"""LLaVA-1.5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.families import Sample, tensors_of, text_sizes, write_tokenizer

if TYPE_CHECKING:
    import torch

IMAGE, BOS = 634, 635

TEMPLATE = """{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}\
{% for part in message['content'] if part['type'] in ('image', 'image_url') %}{{ '<image>\n' }}\
{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}\
{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


class Llava(Sample):
    name = "llava"
    architecture = "LlavaForConditionalGeneration"
    image_processor_class = "clip.image_processing_pil_clip:CLIPImageProcessorPil"
    processor_class = "llava.processing_llava:LlavaProcessor"

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        tower = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 32,
        }
        bos = {"bos_token_id": BOS, "tie_word_embeddings": tied}
        return LlavaConfig(
            text_config=LlamaConfig(**(text_sizes() | bos | text)),
            vision_config=CLIPVisionConfig(**(tower | vision)),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=16,
            tie_word_embeddings=tied,
        )

    def old_name(self, name: str) -> str:
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.language_model.", "language_model.model.")
        return name.replace("model.multi_modal_projector.", "multi_modal_projector.")

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields["image_token_index"] = IMAGE
        fields.pop("image_token_id", None)
        fields["torch_dtype"] = fields.pop("dtype", None)
        rope = fields["text_config"].pop("rope_parameters", {})
        fields["text_config"]["rope_theta"] = rope.get("rope_theta", 10000.0)
        return fields

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        return {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "size": {"shortest_edge": side},
        }

    def processor_settings(self, config: Any) -> Any:
        return {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }

    def write_tokenizer(self, directory: Path) -> None:
        write_tokenizer(
            directory,
            {"<image>": IMAGE, "<s>": BOS},
            TEMPLATE,
            bos="<s>",
            extra_special_tokens={"image_token": "<image>"},
            processor_class="LlavaProcessor",
        )

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        tower = {f"tower.{k}": v for k, v in tensors_of(model.model.vision_tower).items()}
        last = f"tower.encoder.layers.{model.config.vision_config.num_hidden_layers - 1}."
        unused = (last, "tower.post_layernorm")
        tower = {k: v for k, v in tower.items() if not k.startswith(unused)}
        projector = tensors_of(model.model.multi_modal_projector)
        return tower | {f"projector.{name}": tensor for name, tensor in projector.items()}


SAMPLES = (Llava(),)
