"""PaddleOCR-VL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.families import EXTRA, VIDEO_PAD, mrope_sizes, tensors_of, write_tokenizer
from tests.families.qwen2_vl import Qwen2VL

if TYPE_CHECKING:
    import torch

TOKENS = {
    "<|IMAGE_PLACEHOLDER|>": EXTRA,
    "<|IMAGE_START|>": EXTRA + 1,
    "<|IMAGE_END|>": EXTRA + 2,
}

TEMPLATE = """{% for message in messages %}{{ message['role'].title() + ': ' }}\
{% if message['content'] is string %}{{ message['content'] + '\n' }}{% else %}\
{% for part in message['content'] if part['type'] in ('image', 'image_url') %}\
{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\
{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""


class PaddleOcrVL(Qwen2VL):
    name = "paddleocr_vl"
    architecture = "PaddleOCRVLForConditionalGeneration"
    image_processor_class = (
        "paddleocr_vl.image_processing_pil_paddleocr_vl:PaddleOCRVLImageProcessorPil"
    )
    processor_class = "paddleocr_vl.processing_paddleocr_vl:PaddleOCRVLProcessor"
    around = ((TOKENS["<|IMAGE_START|>"],), (TOKENS["<|IMAGE_END|>"],))

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import PaddleOCRVLConfig

        tower = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 84,
        }
        text = mrope_sizes() | {"head_dim": 16, "tie_word_embeddings": tied} | text
        return PaddleOCRVLConfig(
            text_config=text,
            vision_config=tower | vision,
            image_token_id=TOKENS["<|IMAGE_PLACEHOLDER|>"],
            video_token_id=VIDEO_PAD,
            vision_start_token_id=TOKENS["<|IMAGE_START|>"],
            vision_end_token_id=TOKENS["<|IMAGE_END|>"],
            tie_word_embeddings=tied,
        )

    def old_name(self, name: str) -> str:
        return super().old_name(name).replace("model.projector.", "mlp_AR.")

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields = super().old_config(fields)
        fields["rope_scaling"]["type"] = "default"
        fields["vision_config"] |= {"model_type": "paddleocr_vl", "temporal_patch_size": 2}
        return fields

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        usual = dict(super().image_settings(layout, config, settings))
        return usual | {
            "image_processor_type": "PaddleOCRVLImageProcessor",
            "processor_class": "PaddleOCRVLProcessor",
        }

    def write_tokenizer(self, directory: Path) -> None:
        write_tokenizer(
            directory,
            TOKENS,
            TEMPLATE,
            extra_special_tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"},
            processor_class="PaddleOCRVLProcessor",
        )

    def pixels(self, inputs: Any) -> Any:
        """[patches, 3, side, side], row by row -> [patches, side, side, 3], by merge blocks."""
        values = np.asarray(inputs["pixel_values"]).transpose(0, 2, 3, 1)
        _, h, w = (int(each) for each in inputs["image_grid_thw"][0])
        blocks = values.reshape(h // 2, 2, w // 2, 2, *values.shape[1:])
        return blocks.swapaxes(1, 2).reshape(values.shape)

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        parts = {"tower": model.model.visual.vision_model, "projector": model.model.projector}
        return {
            f"{name}.{key}": tensor
            for name, part in parts.items()
            for key, tensor in tensors_of(part).items()
        }


SAMPLES = (PaddleOcrVL(),)
