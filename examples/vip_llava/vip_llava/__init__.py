"""ViP-LLaVA: LLaVA-1.5 with a projector that reads several layers of the tower."""

from opticnerve.models.family import Family
from opticnerve.models.llava import LANGUAGE_KEYS, VISION_KEYS

FAMILY = Family(
    package=__name__,
    title="ViP-LLaVA",
    model_types=("vipllava",),
    layout=".layout:VipLlavaLayout",
    preprocess="opticnerve.models.llava.preprocess:CenterCrop",
    tower=".vision:describe_tower",
    decoder=".language:describe_decoder",
    vision_keys=VISION_KEYS,
    language_keys=LANGUAGE_KEYS,
)
