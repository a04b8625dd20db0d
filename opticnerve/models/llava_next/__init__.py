"""LLaVA-NeXT, also called LLaVA-1.6."""

from opticnerve.models import llava
from opticnerve.models.family import Family

VISION_KEYS = (*llava.VISION_KEYS, (r"(?:model\.)?image_newline$", "image_newline"))

GRAPH = "opticnerve.models.llava_next.vision:describe_graph"

FAMILY = Family(
    package=__name__,
    title="LLaVA-NeXT",
    model_types=("llava_next",),
    layout=".layout:LlavaNextLayout",
    preprocess=".preprocess:CutTiles",
    tower=".vision:describe_tower",
    graph=GRAPH,
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=llava.LANGUAGE_KEYS,
)
