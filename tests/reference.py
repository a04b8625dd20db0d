"""The unsplit Hugging Face model of a checkpoint: what the split one must equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from transformers import AttentionInterface, AutoModelForImageTextToText

from opticnerve.media.plan import Plan, Span
from opticnerve.models.towers.pixels import PixelTable
from tests.families import samples

CAUSAL = "opticnerve_test_causal"


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model, loaded by transformers."""
    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval()


def image_processor(path: Path, family: str) -> Any:
    """The Pillow-backed image processor of a sample's checkpoint."""
    return samples()[family].image_processor(path)


def pixel_values(layout: Any, pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """``pixels`` of several pictures as Hugging Face's processors return them: float32 [patches,
    channels * frames * patch²] for layouts of patches, [tiles, 3, height, width] for others."""
    table = PixelTable(layout.pixels, torch.float32, "cpu")
    values = table(torch.from_numpy(np.concatenate(pixels))).permute(0, 3, 1, 2)
    frames = getattr(layout, "temporal_patch_size", None)
    if frames is None:
        return values.contiguous()
    return values[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)


def image_rows(model: Any, family: str, inputs: Any) -> torch.Tensor:
    """Embedding rows of one picture, from an image processor's output for it."""
    return samples()[family].rows(model, inputs)["rows"]


def place(layout: Any, plan: Plan, offset: int, item: int) -> tuple[tuple[int, ...], list[Span]]:
    """The tokens of an item whose expansion begins at ``offset`` of a prompt, and its spans."""
    expansion = layout.expand(plan)
    spans = [
        Span(offset + run.offset, run.num_tokens, item, run.row_start, plan.modality, plan.grid)
        for run in expansion.runs
    ]
    return expansion.token_ids, spans


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
