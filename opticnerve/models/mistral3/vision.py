"""Mistral 3's vision tower, which is Pixtral's, and its projector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Mistral3Config, PixtralVisionModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from opticnerve.checkpoints.loader import rotary_buffers, transformers_config
from opticnerve.models.llava.vision import feature_layers
from opticnerve.models.mistral3.layout import Mistral3Layout
from opticnerve.models.towers import varlen
from opticnerve.models.towers.pixels import check_pixels, upload
from opticnerve.models.towers.tower import ModuleTower, TowerSpec, position_ids, without_batch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.media.plan import Grid, Plan


class PixtralProjector(nn.Module):  # type: ignore[misc]
    """The tower's layers, up to the last that the projector reads, and the projector."""

    def __init__(self, config: Any, projector: nn.Module) -> None:
        super().__init__()
        vision = config.vision_config
        self.layers = feature_layers(config.vision_feature_layer, vision.num_hidden_layers)
        self.tower: Any = PixtralVisionModel(vision)
        del self.tower.transformer.layers[max(self.layers) :]
        self.projector: Any = projector

    def forward(
        self, patches: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], **packed: Any
    ) -> torch.Tensor:
        """[patches, 3, patch_size, patch_size] -> [tokens, hidden_size].

        ``rotary``: the cosines and sines of the patches' positions, [patches, head_dim] each;
        ``packed``: what ``varlen.attend`` takes.
        """
        hidden = self.tower.ln_pre(self.tower.patch_conv(patches).flatten(1))[None]
        states = [hidden]
        for layer in self.tower.transformer.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, **packed)
            states.append(hidden)
        return self.project(torch.cat([states[i][0] for i in self.layers], dim=-1))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[patches, width] -> [tokens, hidden_size]."""
        rows: torch.Tensor = self.projector(hidden)
        return rows


class MergingProjector(PixtralProjector):
    """Joins the patches of each merge block, which follow one another, into one token."""

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        merger = self.projector.patch_merger
        blocks = self.projector.norm(hidden).unflatten(0, (-1, merger.spatial_merge_size**2))
        merged = merger.merging_layer(blocks.transpose(1, 2).flatten(1))
        wide = self.projector.act(self.projector.linear_1(merged))
        rows: torch.Tensor = self.projector.linear_2(wide)
        return rows


class PixtralTower(ModuleTower):
    """Implements ``opticnerve.models.family.Tower`` for pictures of any size, packed. Patches are
    ordered by merge blocks."""

    def __init__(self, module: Any, layout: Mistral3Layout) -> None:
        super().__init__(module, layout.pixels, layout.hidden_size)
        self.patch_size = layout.patch_size
        self.merge_size = layout.merge_size
        varlen.use(module.tower)

    def encode(
        self, pixels: Sequence[NDArray[np.uint8]], plans: Sequence[Plan]
    ) -> list[dict[str, torch.Tensor]]:
        """See ``family.Tower``. Raises PlanMismatch when patches and plan differ."""
        for patches, plan in zip(pixels, plans, strict=True):
            check_pixels(patches, plan.num_patches, self.patch_size, self.patch_size, 3)
        with torch.inference_mode():
            values = self.table(upload(pixels, self.device)).permute(0, 3, 1, 2)
            rows = self.module(values, **self.precompute([plan.grid for plan in plans]))
            items = rows.split([plan.num_tokens for plan in plans])
            return [{"rows": without_batch(item)} for item in items]

    def precompute(self, grids: Sequence[Grid]) -> dict[str, Any]:
        """Keyword arguments of the module that depend only on the pictures' sizes."""
        packing = varlen.Packing.of([grid.num_patches for grid in grids], self.device)
        places = [
            torch.from_numpy(position_ids(1, grid.h, grid.w, self.merge_size)) for grid in grids
        ]
        rotary = self.module.tower.patch_positional_embedding
        return {
            "rotary": rotary(rotary.inv_freq.to(self.dtype), torch.cat(places).to(self.device)),
            "cu_seq_lens_q": packing.cu_seqlens,
            "packings": (packing,),
        }


def describe_tower(checkpoint: Checkpoint) -> TowerSpec:
    config = transformers_config(Mistral3Config, checkpoint)
    return pixtral_tower(
        config,
        Mistral3Layout(checkpoint),
        lambda: MergingProjector(config, Mistral3MultiModalProjector(config)),
    )


def pixtral_tower(
    config: Any, layout: Mistral3Layout, make_module: Callable[[], PixtralProjector]
) -> TowerSpec:
    """A Pixtral tower and its projector. ``config``: transformers' configuration of the whole
    model."""
    depth = config.vision_config.num_hidden_layers
    last = max(feature_layers(config.vision_feature_layer, depth))
    unused = "|".join(map(str, range(last, depth))) or "none"
    return TowerSpec(
        make_module=make_module,
        make_tower=lambda module: PixtralTower(module, layout),
        recomputed=rotary_buffers("tower.patch_positional_embedding"),
        ignored=(rf".*vision_tower\.transformer\.layers\.(?:{unused})\.",),
    )
