"""Mistral 3, with either of its text models."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.families import Sample, tensors_of, text_sizes, write_tokenizer

if TYPE_CHECKING:
    import torch

IMAGE, BREAK, END, BOS = 634, 635, 636, 637
WIDE = {"hidden_size": 96, "head_dim": 16}  # Heads are narrower than the width over their number.

TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '[INST]' }}{% endif %}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{{ '[IMG]' if part['type'] in ('image', 'image_url') else part['text'] }}\
{% endfor %}{% endif %}\
{% if message['role'] == 'user' %}{{ '[/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"""


def tower_sizes() -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 180,
        "patch_size": 10,
    }


class PixtralSample(Sample):
    """What the families with a Pixtral tower share."""

    image_processor_class = "pixtral.image_processing_pil_pixtral:PixtralImageProcessorPil"
    processor_class = "pixtral.processing_pixtral:PixtralProcessor"
    patch_size: int = 10
    merge_size: int = 2

    def old_name(self, name: str) -> str:
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        name = name.replace("model.language_model.", "language_model.model.")
        return name.removeprefix("model.")

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        return {
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": "PixtralProcessor",
            "patch_size": {"height": self.patch_size, "width": self.patch_size},
            "size": {"longest_edge": config.vision_config.image_size},
        }

    def processor_settings(self, config: Any) -> Any:
        return {
            "processor_class": "PixtralProcessor",
            "patch_size": self.patch_size,
            "spatial_merge_size": self.merge_size,
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        }

    def write_tokenizer(self, directory: Path) -> None:
        write_tokenizer(
            directory,
            {"[IMG]": IMAGE, "[IMG_BREAK]": BREAK, "[IMG_END]": END, "<s>": BOS},
            TEMPLATE,
            bos="<s>",
            processor_class="PixtralProcessor",
        )

    def image_processor(self, path: Path) -> Any:
        """Alone it would cut patches; the processor asks it for tokens."""
        processor = super().image_processor(path)
        side = self.patch_size * self.merge_size
        processor.patch_size = {"height": side, "width": side}
        return processor

    def processor(self, path: Path) -> Any:
        """Its module takes a function from the image processor that needs torchvision, and the
        Pillow-backed one has the same."""
        package = "transformers.models.pixtral"
        backed_by_pillow = import_module(f"{package}.image_processing_pil_pixtral")
        sys.modules.setdefault(f"{package}.image_processing_pixtral", backed_by_pillow)
        return super().processor(path)

    def process(self, processor: Any, text: str, images: list[Any]) -> dict[str, Any]:
        """The template writes the token that begins a sequence."""
        given = {"images": images} if images else {}
        return dict(processor(text=[text], **given, add_special_tokens=False, return_tensors="pt"))

    def pixels(self, inputs: Any) -> Any:
        """[1, 3, height, width] -> patches by merge blocks."""
        values = np.asarray(inputs["pixel_values"])[0]
        merge, side = self.merge_size, self.patch_size
        shape = (3, values.shape[1] // merge // side, merge, side, -1, merge, side)
        blocks = values.reshape(shape).transpose(1, 4, 2, 5, 3, 6, 0)
        return blocks.reshape(-1, side, side, 3)

    def tower_tensors(self, model: Any) -> dict[str, torch.Tensor]:
        tower = {f"tower.{k}": v for k, v in tensors_of(model.model.vision_tower).items()}
        projector = tensors_of(model.model.multi_modal_projector)
        return tower | {f"projector.{name}": tensor for name, tensor in projector.items()}


class Mistral3(PixtralSample):
    name = "mistral3"
    architecture = "Mistral3ForConditionalGeneration"

    def text(self, sizes: dict[str, Any]) -> Any:
        from transformers import MistralConfig

        return MistralConfig(**sizes, sliding_window=None)

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import Mistral3Config, PixtralVisionConfig

        sizes = text_sizes() | {"bos_token_id": BOS, "tie_word_embeddings": tied} | WIDE
        return Mistral3Config(
            text_config=self.text(sizes | text),
            vision_config=PixtralVisionConfig(**(tower_sizes() | vision)),
            image_token_index=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
            tie_word_embeddings=tied,
        )

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Without what transformers 5 adds: rotary settings by name, ties at the top."""
        for part in (fields["text_config"], fields["vision_config"]):
            rope = part.pop("rope_parameters")
            part["rope_theta"] = rope["rope_theta"]
            part.pop("dtype", None)
        fields["torch_dtype"] = fields.pop("dtype", None)
        return fields


class Ministral3(Mistral3):
    """Rotary embeddings of type yarn, and queries that grow with their positions."""

    name = "ministral3"

    @property
    def family(self) -> str:
        return "mistral3"

    def text(self, sizes: dict[str, Any]) -> Any:
        from transformers import Ministral3Config

        rope = {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
        return Ministral3Config(**({"rope_parameters": rope} | sizes))

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        """It was published with the settings of transformers 5."""
        return fields


SAMPLES = (Mistral3(), Ministral3())
