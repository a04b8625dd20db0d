"""Gemma 3 with pictures: 4B, 12B and 27B."""

from opticnerve.models.family import Family
from opticnerve.models.llava import LANGUAGE_KEYS, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="Gemma 3",
    model_types=("gemma3",),
    layout=".layout:Gemma3Layout",
    preprocess=".preprocess:ResizeToSquare",
    tower=".vision:describe_tower",
    graph=".vision:describe_graph",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
