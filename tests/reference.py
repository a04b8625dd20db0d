"""The unsplit Hugging Face model of a checkpoint: what the split one must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from transformers import AttentionInterface, AutoModelForImageTextToText

from opticnerve.media.plan import Plan, Span, SpanAttention
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
        Span(
            token_offset=offset + run.offset,
            num_tokens=run.num_tokens,
            item=item,
            row_start=run.row_start,
            modality=plan.modality,
            grid_thw=plan.grid,
            attention=plan.attention,
        )
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


_both_ways: list[tuple[int, int]] = []


@contextmanager
def both_ways(spans: Sequence[Span]) -> Iterator[None]:
    """Within it, tokens of each bidirectional one of ``spans`` see one another under ``CAUSAL``."""
    _both_ways.extend(
        (span.token_offset, span.token_offset + span.num_tokens)
        for span in spans
        if span.attention is SpanAttention.BIDIRECTIONAL
    )
    try:
        yield
    finally:
        _both_ways.clear()


def _causal(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention of one sequence, with the layer's window and what ``both_ways`` says; fails
    when transformers built a mask."""
    if mask is not None:
        raise AssertionError("a mask was built")
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    for begin, end in _both_ways:
        seen[begin:end, begin:end] = True
    if kwargs.get("sliding_window"):
        seen &= ~seen.tril(-kwargs["sliding_window"])
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=kwargs["scaling"], enable_gqa=True
    )
    return output.transpose(1, 2), None


AttentionInterface.register(CAUSAL, _causal)
