"""Pixtral in Hugging Face's format, whose config.json calls it a LLaVA with a pixtral tower."""

from opticnerve.models.family import Family
from opticnerve.models.llava import LANGUAGE_KEYS, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="Pixtral",
    model_types=("llava/pixtral",),
    layout=".layout:PixtralLayout",
    preprocess="opticnerve.models.qwen2_vl.preprocess:Patchify",
    tower=".vision:describe_tower",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
