"""PaddleOCR-VL's decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PaddleOCRTextModel, PaddleOCRVLConfig

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.decoders.spec import DecoderSpec, llama_like

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    config = transformers_config(PaddleOCRVLConfig, checkpoint)
    return llama_like(config, PaddleOCRTextModel, position_dims=3)
