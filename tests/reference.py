"""The unsplit Hugging Face model of a checkpoint: what the split one must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from transformers import AttentionInterface, AutoModelForImageTextToText
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

CAUSAL = "opticnerve_test_causal"


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model, loaded by transformers."""
    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval()


def image_processor(path: Path, family: str) -> Any:
    """The Pillow-backed image processor of a checkpoint."""
    cls = CLIPImageProcessorPil if family == "llava" else Qwen2VLImageProcessorPil
    return cls.from_pretrained(path)


def image_rows(model: Any, family: str, inputs: Any) -> torch.Tensor:
    """Embedding rows of one picture, from an image processor's output for it."""
    with torch.inference_mode():
        if family == "llava":
            return model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return features.pooler_output[0]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture with some noise: what resizing filters differ on."""
    rng = np.random.default_rng((seed, width, height))
    coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-40, 41, (height, width, 3))
    pixels: NDArray[np.int64] = np.asarray(smooth).astype(np.int64) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _causal(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Plain causal attention of one sequence; fails when transformers built a mask."""
    if mask is not None:
        raise AssertionError("a mask was built")
    output = F.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, scale=kwargs["scaling"], enable_gqa=True
    )
    return output.transpose(1, 2), None


AttentionInterface.register(CAUSAL, _causal)
