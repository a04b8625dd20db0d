"""Qwen3-VL, dense and with a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tests.families import special_ids, text_sizes
from tests.families.qwen2_vl import Qwen2VL

if TYPE_CHECKING:
    import torch

TOWER = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 16,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    processor_class = "qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor"
    mean: ClassVar = [0.5, 0.5, 0.5]
    std: ClassVar = mean

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import Qwen3VLConfig

        sizes = text_sizes() | {"head_dim": 16, "rope_parameters": ROPE}
        text = sizes | {"tie_word_embeddings": tied} | text
        return Qwen3VLConfig(
            text_config=text,
            vision_config=TOWER | {"out_hidden_size": text["hidden_size"]} | vision,
            **special_ids(tied),
        )

    def old_name(self, name: str) -> str:
        return name

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Rotary settings in two places; the tower has the whole model's type."""
        rope = fields["text_config"].pop("rope_parameters")
        fields["text_config"]["rope_theta"] = rope.pop("rope_theta")
        fields["text_config"]["rope_scaling"] = rope
        fields["vision_config"]["model_type"] = fields["model_type"]
        fields["vision_config"].pop("rope_parameters", None)
        return fields

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        usual = dict(super().image_settings("new", config, settings))
        return usual | {"processor_class": "Qwen3VLProcessor"}

    def rows(self, model: Any, inputs: Any) -> dict[str, torch.Tensor]:
        import torch

        with torch.inference_mode():
            features = model.model.get_image_features(**inputs)
        levels = (features.pooler_output, *features.deepstack_features)
        names = ("rows", *(f"deepstack.{i}" for i in range(len(levels) - 1)))
        return {name: torch.cat(tuple(level)) for name, level in zip(names, levels, strict=True)}


class Qwen3VLMoe(Qwen3VL):
    """Its second layer is dense."""

    name = "qwen3_vl_moe"
    architecture = "Qwen3VLMoeForConditionalGeneration"
    has_experts = True

    @property
    def family(self) -> str:
        return "qwen3_vl"

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import Qwen3VLMoeConfig

        experts = {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "mlp_only_layers": [1],
        }
        sizes = text_sizes() | experts | {"head_dim": 16, "rope_parameters": ROPE}
        text = sizes | {"tie_word_embeddings": tied} | text
        return Qwen3VLMoeConfig(
            text_config=text,
            vision_config=TOWER | {"out_hidden_size": text["hidden_size"]} | vision,
            **special_ids(tied),
        )

    def old_tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Experts are stacked, and their weights multiply from the right."""
        stacked = ".experts." in name
        return {name: tensor.transpose(1, 2).contiguous() if stacked else tensor}


SAMPLES = (Qwen3VL(), Qwen3VLMoe())
