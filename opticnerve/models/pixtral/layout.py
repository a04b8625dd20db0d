"""Pixtral's layout: Mistral 3's, with a token for every patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opticnerve.models.mistral3.layout import Mistral3Layout

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class PixtralLayout(Mistral3Layout):
    family = "pixtral"

    def _read_merge_size(self, checkpoint: Checkpoint) -> int:
        return 1
