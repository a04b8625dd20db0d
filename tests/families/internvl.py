"""InternVL 3.5: an InternViT tower and a Qwen3."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.families import EXTRA, Sample, tensors_of, text_sizes, write_tokenizer

if TYPE_CHECKING:
    import torch

CONTEXT, START, END = EXTRA, EXTRA + 1, EXTRA + 2

TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] in ('image', 'image_url') %}{{ '<IMG_CONTEXT>\n' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


class InternVL(Sample):
    name = "internvl"
    architecture = "InternVLForConditionalGeneration"
    image_processor_class = "got_ocr2.image_processing_pil_got_ocr2:GotOcr2ImageProcessorPil"
    processor_class = "internvl.processing_internvl:InternVLProcessor"
    mean = [0.485, 0.456, 0.406]  # noqa: RUF012
    std = [0.229, 0.224, 0.225]  # noqa: RUF012

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import InternVLConfig

        tower = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "attention_bias": True,
        }
        sizes = text_sizes() | {"model_type": "qwen3", "head_dim": 16}
        return InternVLConfig(
            text_config=sizes | {"tie_word_embeddings": tied} | text,
            vision_config=tower | vision,
            image_token_id=CONTEXT,
            tie_word_embeddings=tied,
        )

    def old_name(self, name: str) -> str:
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        name = name.replace("model.language_model.", "language_model.model.")
        return name.replace("model.vision_tower.", "vision_tower.").replace(
            "model.multi_modal_projector.", "multi_modal_projector."
        )

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields["torch_dtype"] = fields.pop("dtype", None)
        rope = fields["text_config"].pop("rope_parameters")
        return fields | {
            "text_config": fields["text_config"]
            | {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        }

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        height, width = config.vision_config.image_size
        return {
            "crop_to_patches": False,  # As published; the processor cuts all the same.
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "processor_class": "InternVLProcessor",
            "min_patches": 1,
            "max_patches": 6,
            "size": {"height": height, "width": width},
        }

    def processor_settings(self, config: Any) -> Any:
        (size, _), (patch, _) = config.vision_config.image_size, config.vision_config.patch_size
        tokens = (size // patch // 2) ** 2
        return {"processor_class": "InternVLProcessor", "image_seq_length": tokens}

    def write_tokenizer(self, directory: Path) -> None:
        write_tokenizer(
            directory,
            {"<IMG_CONTEXT>": CONTEXT, "<img>": START, "</img>": END},
            TEMPLATE,
            extra_special_tokens={
                "context_image_token": "<IMG_CONTEXT>",
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "video_token": "<|video_pad|>",
            },
            processor_class="InternVLProcessor",
        )

    def image_processor(self, path: Path) -> Any:
        processor = super().image_processor(path)
        processor.crop_to_patches = True  # What InternVLProcessor asks of it.
        return processor

    def image_inputs(self, image_processor: Any, images: list[Any]) -> dict[str, Any]:
        given = super().image_inputs(image_processor, images)
        return {"pixel_values": given["pixel_values"]}

    def rows(self, model: Any, inputs: Any) -> dict[str, torch.Tensor]:
        return super().rows(model, {"pixel_values": inputs["pixel_values"]})

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        return {
            f"{ours}.{name}": tensor
            for ours, theirs in (("tower", "vision_tower"), ("projector", "multi_modal_projector"))
            for name, tensor in tensors_of(getattr(model.model, theirs)).items()
        }


SAMPLES = (InternVL(),)
