"""ViP-LLaVA's vision half: LLaVA's tower, and a projector of its own."""

from transformers import VipLlavaConfig
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

from opticnerve.checkpoints.checkpoint import Checkpoint
from opticnerve.checkpoints.loader import transformers_config
from opticnerve.models.llava.vision import SquareProjector, square_tower
from opticnerve.models.towers.tiles import TileTower
from opticnerve.models.towers.tower import TowerSpec

from .layout import VipLlavaLayout


class VipProjector(SquareProjector):
    projector_class = VipLlavaMultiModalProjector


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    layout = VipLlavaLayout(checkpoint)
    config = transformers_config(VipLlavaConfig, checkpoint)
    return square_tower(
        config,
        make_module=lambda: VipProjector(config, layout),
        make_tower=lambda module: TileTower(
            module, layout.pixels, layout.hidden_size, layout.image_size
        ),
    )
