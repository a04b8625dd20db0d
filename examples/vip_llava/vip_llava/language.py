"""ViP-LLaVA's language half: Vicuna, which is Llama."""

from transformers import VipLlavaConfig

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.decoders.spec import DecoderSpec
from opticnerve.models.llava.language import text_decoder


def describe_decoder(checkpoint: Checkpoint) -> DecoderSpec:
    return text_decoder(transformers_config(VipLlavaConfig, checkpoint))
