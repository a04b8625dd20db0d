"""LLaVA-1.5."""

from opticnerve.models.family import Family

FAMILY = Family(
    package=__name__,
    title="LLaVA-1.5",
    model_types=("llava",),
    layout=".layout:LlavaLayout",
    preprocess=".preprocess:CenterCrop",
    tower=".vision:describe_tower",
    graph=".vision:describe_graph",
    decoder=".language:describe_decoder",
    # Published as vision_tower.vision_model.*; later with "model." before it, then without
    # "vision_model".
    vision_keys=(
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "tower."),
        (r"(?:model\.)?multi_modal_projector\.", "projector."),
    ),
    # Published as language_model.model.* and language_model.lm_head.*; since transformers 5
    # model.language_model.* and lm_head.*.
    language_keys=(
        (r"(?:language_model\.)?lm_head\.", "lm_head."),
        (r"language_model\.model\.", "model."),
        (r"model\.language_model\.", "model."),
    ),
)
