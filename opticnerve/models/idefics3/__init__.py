"""Idefics3."""

from opticnerve.models.family import Family

VISION_KEYS = (
    (r"model\.vision_model\.", "tower."),
    (r"model\.connector\.", "connector."),
)
LANGUAGE_KEYS = (
    (r"lm_head\.", "lm_head."),
    (r"model\.text_model\.", "model."),
)

FAMILY = Family(
    package=__name__,
    title="Idefics3",
    model_types=("idefics3",),
    layout=".layout:Idefics3Layout",
    preprocess=".preprocess:TilesOfCanvas",
    tower=".vision:describe_tower",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
