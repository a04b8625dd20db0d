"""SmolVLM and SmolVLM2."""

from opticnerve.models.family import Family
from opticnerve.models.idefics3 import LANGUAGE_KEYS, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="SmolVLM",
    model_types=("smolvlm",),
    layout=".layout:SmolVLMLayout",
    preprocess="opticnerve.models.idefics3.preprocess:TilesOfCanvas",
    tower=".vision:describe_tower",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
