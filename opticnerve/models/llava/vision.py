"""LLaVA-1.5's CLIP tower and projector; its successors use parts of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import CLIPVisionModel, LlavaConfig, SiglipVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from opticnerve.checkpoints.loader import transformers_config
from opticnerve.errors import CheckpointError, UnsupportedCheckpoint
from opticnerve.models.llava.layout import LlavaLayout
from opticnerve.models.towers.tile_graph import TileGraph
from opticnerve.models.towers.tiles import TileTower
from opticnerve.models.towers.tower import TowerSpec

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.family import Tower


TOWERS: dict[str, Any] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
UNREAD = ("post_layernorm", "head")  # They make a pooled row, which the projector does not read.


class SquareProjector(nn.Module):  # type: ignore[misc]
    """The first layers of a CLIP or SigLIP tower, up to the last that the projector reads, and the
    projector.

    ``config``: transformers' configuration of the whole model. A subclass may name another
    ``projector_class``, which is made from it.
    """

    projector_class: ClassVar[Any] = LlavaMultiModalProjector

    def __init__(self, config: Any, layout: LlavaLayout) -> None:
        super().__init__()
        vision = config.vision_config
        # Indices of hidden states; 0 is the embeddings.
        self.layers = feature_layers(config.vision_feature_layer, vision.num_hidden_layers)
        self.tower: Any = TOWERS[vision.model_type](vision)
        del self.tower.encoder.layers[max(self.layers) :]
        for name in UNREAD:
            if hasattr(self.tower, name):
                delattr(self.tower, name)
        self.projector = self.projector_class(config)
        self.first_row = 1 if layout.strategy == "default" else 0  # Row 0 is the class token.

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[pictures, 3, height, width] -> [pictures, tokens, hidden_size]."""
        hidden = self.tower.embeddings(pixels)
        if hasattr(self.tower, "pre_layrnorm"):  # CLIP's.
            hidden = self.tower.pre_layrnorm(hidden)
        states = [hidden]
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        picked = torch.cat([states[i][:, self.first_row :] for i in self.layers], dim=-1)
        rows: torch.Tensor = self.projector(picked)
        return rows


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    """Raises CheckpointError for a tower that is not CLIP's, or that lacks the projector's
    layer."""
    layout = LlavaLayout(checkpoint)  # It refuses other towers.
    config = transformers_config(LlavaConfig, checkpoint)
    return square_tower(
        config,
        lambda: SquareProjector(config, layout),
        lambda module: TileTower(module, layout.pixels, layout.hidden_size, layout.image_size),
    )


def square_tower(
    config: Any, make_module: Callable[[], nn.Module], make_tower: Callable[[Any], Tower]
) -> TowerSpec:
    """The declaration of a tower whose module is a ``SquareProjector`` made from ``config``."""
    depth = config.vision_config.num_hidden_layers
    last = max(feature_layers(config.vision_feature_layer, depth))
    unused = "|".join(map(str, range(last, depth))) or "none"
    return TowerSpec(
        make_module=make_module,
        make_tower=make_tower,
        recomputed={"tower.embeddings.position_ids": position_ids},
        ignored=(
            rf".*vision_tower\.(?:.*\.)?(?:{'|'.join(UNREAD)})\.",
            rf".*vision_tower\..*encoder\.layers\.(?:{unused})\.",
            r".*vision_tower\..*embeddings\.position_ids$",  # Computed; old checkpoints carry it.
        ),
    )


def describe_graph(tower: TileTower) -> TileGraph:
    return TileGraph(tower, *square_sizes(tower.module))


def square_sizes(module: Any) -> tuple[int, int, int]:
    """(side in pixels, patches, tokens) of a ``SquareProjector``'s picture."""
    embeddings = module.tower.embeddings
    tokens = embeddings.num_positions - module.first_row
    return embeddings.image_size, embeddings.num_patches, tokens


def feature_layers(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of hidden states, 0 to ``depth``; ``layers`` may count from the end. Raises
    CheckpointError."""
    wanted = (layers,) if isinstance(layers, int) else tuple(layers)
    found = tuple(i + depth + 1 if i < 0 else i for i in wanted)
    if not found or not all(0 <= i <= depth for i in found):
        raise CheckpointError(f"vision_feature_layer {layers} is not in a tower of {depth} layers")
    if max(found) == 0:
        raise UnsupportedCheckpoint("vision_feature_layer names the tower's embeddings alone")
    return found


def position_ids(embeddings: Any) -> torch.Tensor:
    """int64 [1, positions]: a buffer of CLIP's and SigLIP's embeddings."""
    return torch.arange(embeddings.num_positions)[None]
