"""GLM-4.1V, GLM-4.5V and GLM-4.6V."""

from opticnerve.models.family import Family
from opticnerve.models.qwen2_vl import LANGUAGE_KEYS, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="GLM-4V",
    model_types=("glm4v", "glm4v_moe", "glm46v"),
    layout=".layout:Glm4vLayout",
    preprocess="opticnerve.models.qwen2_vl.preprocess:Patchify",
    tower=".vision:describe_tower",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
