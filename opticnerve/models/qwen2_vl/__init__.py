"""Qwen2-VL."""

from opticnerve.models.family import Family

VISION_KEYS = ((r"(?:model\.)?visual\.", ""),)
"""Published as ``visual.*``, since transformers 5 ``model.visual.*``."""

LANGUAGE_KEYS = (
    (r"lm_head\.", "lm_head."),
    (r"model\.language_model\.", "model."),
    (r"model\.(?!visual\.)", "model."),
)
"""Published as ``model.*``, since transformers 5 ``model.language_model.*``."""

FAMILY = Family(
    package=__name__,
    title="Qwen2-VL",
    model_types=("qwen2_vl",),
    layout=".layout:Qwen2VLLayout",
    preprocess=".preprocess:Patchify",
    tower=".vision:describe_tower",
    graph="opticnerve.models.towers.patch_graph:PatchGraph",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
