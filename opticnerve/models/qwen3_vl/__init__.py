"""Qwen3-VL, dense and with a mixture of experts."""

from opticnerve.models.family import Family
from opticnerve.models.qwen2_vl import LANGUAGE_KEYS, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    layout=".layout:Qwen3VLLayout",
    preprocess="opticnerve.models.qwen2_vl.preprocess:Patchify",
    tower=".vision:describe_tower",
    graph=".graph:DeepStackGraph",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
