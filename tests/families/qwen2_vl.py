"""Qwen2-VL; the demo's tokenizer and template are of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.families import VISION_END, VISION_START, Sample, mrope_sizes, special_ids

if TYPE_CHECKING:
    import torch


class Qwen2VL(Sample):
    name = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    image_processor_class = "qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil"
    processor_class = "qwen2_vl.processing_qwen2_vl:Qwen2VLProcessor"
    around = ((VISION_START,), (VISION_END,))

    def config(self, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
        from transformers import Qwen2VLConfig

        tower = {"depth": 3, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
        text = mrope_sizes() | {"tie_word_embeddings": tied} | text
        return Qwen2VLConfig(
            text_config=text,
            vision_config=tower | {"hidden_size": text["hidden_size"]} | vision,
            **special_ids(tied),
        )

    def old_name(self, name: str) -> str:
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    def old_config(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Text settings at the top level, mRoPE under ``rope_scaling``, ``torch_dtype``."""
        text = fields.pop("text_config")
        rope = text.pop("rope_parameters")
        dtype = fields.pop("dtype", None)
        old = {k: v for k, v in text.items() if k not in ("model_type", "dtype", "layer_types")}
        old |= {k: v for k, v in fields.items() if k not in ("transformers_version",)}
        old["rope_theta"] = rope["rope_theta"]
        old["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        old["torch_dtype"] = dtype
        old["use_sliding_window"] = False
        old["sliding_window"] = 32768
        for name in ("dtype", "rope_parameters"):
            old["vision_config"].pop(name, None)
        return old

    def image_settings(self, layout: str, config: Any, settings: dict[str, Any]) -> Any:
        vision = config.vision_config
        low, high = settings.pop("min_pixels", 56 * 56), settings.pop("max_pixels", 64 * 28 * 28)
        limits: dict[str, Any] = {"min_pixels": low, "max_pixels": high}
        if layout == "new":
            limits = {"size": {"shortest_edge": low, "longest_edge": high}}
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "patch_size": vision.patch_size,
            "temporal_patch_size": getattr(vision, "temporal_patch_size", 1),
            "merge_size": vision.spatial_merge_size,
        } | limits

    def token_inputs(self, token_ids: torch.Tensor, image_token_id: int) -> dict[str, Any]:
        usual = super().token_inputs(token_ids, image_token_id)
        return usual | {"mm_token_type_ids": (token_ids == image_token_id).int()}

    def pixels(self, inputs: Any) -> Any:
        """[patches, 3 * frames * side * side] -> [patches, side, side, 3]: frames are equal."""
        values = np.asarray(inputs["pixel_values"])
        side = round((values.shape[1] // 6) ** 0.5)
        frames = values.reshape(len(values), 3, 2, side, side)
        assert np.array_equal(frames[:, :, 0], frames[:, :, 1])
        return frames[:, :, 0].transpose(0, 2, 3, 1)


SAMPLES = (Qwen2VL(),)
