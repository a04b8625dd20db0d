"""SmolVLM, whose tokenizer has a token for each separator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families.idefics3 import Idefics3


class SmolVLM(Idefics3):
    name = "smolvlm"
    architecture = "SmolVLMForConditionalGeneration"
    config_class = "SmolVLMConfig"
    image_processor_class = "smolvlm.image_processing_pil_smolvlm:SmolVLMImageProcessorPil"
    processor_class = "smolvlm.processing_smolvlm:SmolVLMProcessor"
    tokens = (*Idefics3.tokens, "<global-img>")

    def processor(self, path: Path) -> Any:
        from transformers.models.smolvlm import processing_smolvlm

        processing_smolvlm.num2words = str  # It says the number of a video's frames.
        return super().processor(path)


SAMPLES = (SmolVLM(),)
