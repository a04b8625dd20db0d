"""InternVL, as Hugging Face publishes it (InternVL 2.5, 3 and 3.5, names that end in -HF)."""

from opticnerve.models.family import Family
from opticnerve.models.llava import LANGUAGE_KEYS

FAMILY = Family(
    package=__name__,
    title="InternVL",
    model_types=("internvl",),
    layout=".layout:InternVLLayout",
    preprocess=".preprocess:TilesAndThumbnail",
    tower=".vision:describe_tower",
    decoder=".language:describe_decoder",
    # Published as vision_tower.*, later with "model." before it.
    vision_keys=(
        (r"(?:model\.)?vision_tower\.", "tower."),
        (r"(?:model\.)?multi_modal_projector\.", "projector."),
    ),
    language_keys=LANGUAGE_KEYS,
    unserved=(
        (
            "internvl_chat",
            "is InternVL in its authors' own layout; use its Hugging Face conversion, whose name "
            "ends in -hf (OpenGVLab/InternVL3-1B-hf, OpenGVLab/InternVL3_5-1B-HF)",
        ),
    ),
)
