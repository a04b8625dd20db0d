"""Gemma 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tests.families import EXTRA, Sample, tensors_of, text_sizes, write_json, write_tokenizer

if TYPE_CHECKING:
    import torch

BOS, BEGIN, IMAGE, END, TURN, TURN_END, TWO_LINES, THREE_LINES = range(EXTRA, EXTRA + 8)

TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}\
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}\
{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}\
{{ '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


class Gemma3(Sample):
    """Its window is shorter than a picture's 16 tokens. As in the published tokenizer, several line
    breaks are one token."""

    name = "gemma3"
    architecture = "Gemma3ForConditionalGeneration"
    image_processor_class = "gemma3.image_processing_pil_gemma3:Gemma3ImageProcessorPil"
    processor_class = "gemma3.processing_gemma3:Gemma3Processor"
    around = ((BEGIN,), (END,))
    mean: ClassVar = [0.5, 0.5, 0.5]
    std: ClassVar = [0.5, 0.5, 0.5]

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

        tower = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
            "vision_use_head": False,
        }
        own = {
            "bos_token_id": BOS,
            "vocab_size": THREE_LINES + 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": tied,
        }
        return Gemma3Config(
            text_config=Gemma3TextConfig(**(text_sizes() | own | text)),
            vision_config=SiglipVisionConfig(**(tower | vision)),
            mm_tokens_per_image=16,
            image_token_index=IMAGE,
            boi_token_index=BEGIN,
            eoi_token_index=END,
            tie_word_embeddings=tied,
        )

    def old_name(self, name: str) -> str:
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.language_model.", "language_model.model.")
        return name.replace("model.multi_modal_projector.", "multi_modal_projector.")

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields["torch_dtype"] = fields.pop("dtype", None)
        text = fields["text_config"]
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope["full_attention"]["rope_theta"]
        text["rope_scaling"] = {"rope_type": "linear", "factor": rope["full_attention"]["factor"]}
        text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        text["sliding_window_pattern"] = 3
        del text["layer_types"]
        return fields

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        return {
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "image_seq_length": config.mm_tokens_per_image,
            "do_pan_and_scan": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "do_convert_rgb": None,
            "resample": 2,
            "size": {"height": side, "width": side},
        }

    def processor_settings(self, config: Any) -> Any:
        return {
            "processor_class": "Gemma3Processor",
            "image_seq_length": config.mm_tokens_per_image,
        }

    def write_tokenizer(self, directory: Path) -> None:
        tokens = {
            "<bos>": BOS,
            "<start_of_image>": BEGIN,
            "<image_soft_token>": IMAGE,
            "<end_of_image>": END,
            "<start_of_turn>": TURN,
            "<end_of_turn>": TURN_END,
        }
        named = {
            "boi_token": "<start_of_image>",
            "image_token": "<image_soft_token>",
            "eoi_token": "<end_of_image>",
        }
        write_tokenizer(
            directory,
            tokens,
            TEMPLATE,
            bos="<bos>",
            extra_special_tokens=named,
            processor_class="Gemma3Processor",
        )
        file = directory / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        for content, token_id in {"\n\n": TWO_LINES, "\n\n\n": THREE_LINES}.items():
            added = dict(tokenizer["added_tokens"][0], id=token_id, content=content)
            tokenizer["added_tokens"].append(added | {"special": False, "normalized": False})
        write_json(file, tokenizer)

    def process(self, processor: Any, text: str, images: list[Any]) -> dict[str, Any]:
        given = {"images": [images]} if images else {}
        inputs = processor(text=[text], **given, return_tensors="pt", add_special_tokens=False)
        return {name: value for name, value in inputs.items() if name != "num_crops"}

    def image_inputs(self, image_processor: Any, images: list[Any]) -> dict[str, Any]:
        return {"pixel_values": image_processor(images, return_tensors="pt")["pixel_values"]}

    def token_inputs(self, token_ids: torch.Tensor, image_token_id: int) -> dict[str, Any]:
        inputs = super().token_inputs(token_ids, image_token_id)
        return inputs | {"token_type_ids": (token_ids == image_token_id).long()}

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        tower = {f"tower.{k}": v for k, v in tensors_of(model.model.vision_tower).items()}
        projector = tensors_of(model.model.multi_modal_projector)
        return tower | {f"projector.{name}": tensor for name, tensor in projector.items()}


SAMPLES = (Gemma3(),)
