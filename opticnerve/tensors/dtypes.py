"""torch's dtypes by their names in checkpoints, embeddings and options."""

from __future__ import annotations

import torch

FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating-point types by safetensors' names."""

ELEMENT_TYPES = {dtype: name for name, dtype in FLOATING.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name in ``--dtype`` and config.json: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
