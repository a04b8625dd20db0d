"""GLM-4V, dense and with a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.families import EXTRA, text_sizes, write_tokenizer
from tests.families.qwen2_vl import Qwen2VL

if TYPE_CHECKING:
    import torch

TOKENS = {
    "<|image|>": EXTRA,
    "<|begin_of_image|>": EXTRA + 1,
    "<|end_of_image|>": EXTRA + 2,
    "<|video|>": EXTRA + 3,
    "<|begin_of_video|>": EXTRA + 4,
    "<|end_of_video|>": EXTRA + 5,
}

TEMPLATE = """[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] in ('image', 'image_url') %}\
{{ '<|begin_of_image|><|image|><|end_of_image|>' }}{% elif part['type'] == 'text' %}\
{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "image_size": 84,
    "patch_size": 14,
    "intermediate_size": 80,
}


class Glm4v(Qwen2VL):
    name = "glm4v"
    architecture = "Glm4vForConditionalGeneration"
    image_processor_class = "glm4v.image_processing_pil_glm4v:Glm4vImageProcessorPil"
    processor_class = "glm4v.processing_glm4v:Glm4vProcessor"
    around = ((TOKENS["<|begin_of_image|>"],), (TOKENS["<|end_of_image|>"],))

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import Glm4vConfig

        text = self.text() | {"tie_word_embeddings": tied} | text
        return Glm4vConfig(**self.parts(text, vision), tie_word_embeddings=tied)

    def text(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        return text_sizes() | {"rope_parameters": rope | {"partial_rotary_factor": 0.5}}

    def parts(self, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the configuration's class."""
        return {
            "text_config": text,
            "vision_config": TOWER | {"out_hidden_size": text["hidden_size"]} | vision,
            "image_token_id": TOKENS["<|image|>"],
            "image_start_token_id": TOKENS["<|begin_of_image|>"],
            "image_end_token_id": TOKENS["<|end_of_image|>"],
            "video_token_id": TOKENS["<|video|>"],
            "video_start_token_id": TOKENS["<|begin_of_video|>"],
            "video_end_token_id": TOKENS["<|end_of_video|>"],
        }

    def old_name(self, name: str) -> str:
        return name

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        text = fields["text_config"]
        rope = text.pop("rope_parameters")
        text["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
        fields["vision_config"].pop("rope_parameters", None)
        return fields

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        """Bounds are those of two frames."""
        doubled = {k: 2 * settings.pop(k) for k in ("min_pixels", "max_pixels") if k in settings}
        usual = dict(super().image_settings("new", config, doubled))
        names = {"image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor"}
        return usual | names

    def write_tokenizer(self, directory: Path) -> None:
        write_tokenizer(directory, TOKENS, TEMPLATE, processor_class="Glm4vProcessor")


class Glm4vMoe(Glm4v):
    """Its first layer is dense."""

    name = "glm4v_moe"
    architecture = "Glm4vMoeForConditionalGeneration"
    has_experts = True

    @property
    def family(self) -> str:
        return "glm4v"

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import Glm4vMoeConfig

        experts = {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
        }
        text = self.text() | experts | {"tie_word_embeddings": tied} | text
        return Glm4vMoeConfig(**self.parts(text, vision), tie_word_embeddings=tied)

    def old_tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every expert by itself."""
        head, found, stack = name.partition(".experts.")
        if not found:
            return {name: tensor}
        projections = ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,)
        return {
            f"{head}.experts.{i}.{projection}.weight": part.contiguous()
            for i, expert in enumerate(tensor)
            for projection, part in zip(projections, expert.chunk(len(projections)), strict=True)
        }


SAMPLES = (Glm4v(), Glm4vMoe())
