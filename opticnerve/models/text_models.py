"""Shared by all families: sizes of text models, and positions that count up. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opticnerve.checkpoints.json_files import positive
from opticnerve.errors import CheckpointError, InvalidRequest
from opticnerve.media.plan import Span

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint

# Published configs leave out what equals the text model's own defaults:
# model_type -> (hidden_size, max_position_embeddings).
DEFAULTS = {
    "gemma3_text": (2304, 2**17),
    "llama": (4096, 2048),
    "mistral": (4096, 4096 * 32),
    "ministral3": (4096, 2**18),
    "qwen2": (4096, 32768),
    "qwen3": (4096, 32768),
    "qwen3_moe": (2048, 32768),
}


def text_sizes(checkpoint: Checkpoint, usual: str = "llama") -> tuple[int, int]:
    """(hidden_size, max_position_embeddings) of the text model that ``text_config`` describes.

    ``usual``: its model_type if config.json gives none. Raises CheckpointError.
    """
    text = _text_config(checkpoint, usual)
    hidden, positions = DEFAULTS.get(str(text["model_type"]), (None, None))
    return (
        positive(text, "hidden_size", hidden),
        positive(text, "max_position_embeddings", positions),
    )


def _text_config(checkpoint: Checkpoint, usual: str) -> Mapping[str, Any]:
    text = checkpoint.config.get("text_config")
    if text is None:
        return {"model_type": usual}
    if not isinstance(text, Mapping):
        raise CheckpointError("text_config is no JSON object; fetch config.json again")
    return {"model_type": usual, **text}


def count_positions(num_tokens: int, spans: Sequence[Span]) -> tuple[NDArray[np.int64], int]:
    """``Layout.positions`` of a model with one position dimension: int64 [1, num_tokens], from 0.
    Raises InvalidRequest for spans that go beyond the prompt."""
    if any(span.token_offset + span.num_tokens > num_tokens for span in spans):
        raise InvalidRequest("a span goes beyond the prompt's tokens", param="spans")
    return np.arange(num_tokens, dtype=np.int64)[None], 0
