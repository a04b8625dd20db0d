"""Mistral 3: Mistral Small 3.1 and 3.2, and Ministral 3, in Hugging Face's format."""

from opticnerve.models.family import Family
from opticnerve.models.llava import LANGUAGE_KEYS, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="Mistral 3",
    model_types=("mistral3",),
    layout=".layout:Mistral3Layout",
    preprocess="opticnerve.models.qwen2_vl.preprocess:Patchify",
    tower=".vision:describe_tower",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
