"""Qwen2.5-VL."""

from opticnerve.models.family import Family
from opticnerve.models.qwen2_vl import LANGUAGE_KEYS, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    layout=".layout:Qwen25VLLayout",
    preprocess="opticnerve.models.qwen2_vl.preprocess:Patchify",
    tower=".vision:describe_tower",
    graph=".graph:WindowGraph",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
