"""LLaVA-OneVision."""

from opticnerve.models.family import Family
from opticnerve.models.llava import LANGUAGE_KEYS
from opticnerve.models.llava_next import GRAPH, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="LLaVA-OneVision",
    model_types=("llava_onevision",),
    layout=".layout:LlavaOnevisionLayout",
    preprocess=".preprocess:CutTilesOrSquare",
    tower=".vision:describe_tower",
    graph=GRAPH,
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
