"""PaddleOCR-VL."""

from opticnerve.models.family import Family

FAMILY = Family(
    package=__name__,
    title="PaddleOCR-VL",
    model_types=("paddleocr_vl",),
    layout=".layout:PaddleOcrLayout",
    preprocess="opticnerve.models.qwen2_vl.preprocess:Patchify",
    tower=".vision:describe_tower",
    decoder=".language:describe_decoder",
    # Published as visual.* and mlp_AR.*; since transformers 5 model.visual.* and model.projector.*.
    vision_keys=(
        (r"(?:model\.)?visual\.vision_model\.", "tower."),
        (r"(?:mlp_AR|model\.projector)\.", "projector."),
    ),
    # Published as model.*; since transformers 5 model.language_model.*.
    language_keys=(
        (r"lm_head\.", "lm_head."),
        (r"model\.language_model\.", "model."),
        (r"model\.(?!visual\.|projector\.)", "model."),
    ),
)
