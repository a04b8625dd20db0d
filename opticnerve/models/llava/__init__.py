"""LLaVA-1.5."""

from opticnerve.models.family import Family

VISION_KEYS = (
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "tower."),
    (r"(?:model\.)?multi_modal_projector\.", "projector."),
)
"""Published as ``vision_tower.vision_model.*``; later with ``model.`` before it, then without
``vision_model``."""

LANGUAGE_KEYS = (
    (r"(?:language_model\.)?lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model."),
    (r"model\.language_model\.", "model."),
)
"""Published as ``language_model.model.*`` and ``language_model.lm_head.*``; since transformers 5
``model.language_model.*`` and ``lm_head.*``."""

FAMILY = Family(
    package=__name__,
    title="LLaVA-1.5",
    model_types=("llava",),
    layout=".layout:LlavaLayout",
    preprocess=".preprocess:CenterCrop",
    tower=".vision:describe_tower",
    graph=".vision:describe_graph",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
