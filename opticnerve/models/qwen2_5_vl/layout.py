"""Qwen2.5-VL: sized and placed like Qwen2-VL, but a video's temporal positions follow the clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opticnerve.checkpoints.json_files import number
from opticnerve.media.plan import Modality, Span
from opticnerve.models.qwen2_vl.layout import Qwen2VLLayout

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint


class Qwen25VLLayout(Qwen2VLLayout):
    family = "qwen2_5_vl"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.tokens_per_second = number(checkpoint.vision_config, "tokens_per_second", 4)

    def temporal_steps(self, span: Span) -> NDArray[np.int64] | None:
        """Multiples of tokens_per_second * seconds_per_grid, rounded down. Computed in float32 like
        the reference: more digits would round some of them down to another position."""
        if span.modality is not Modality.VIDEO:
            return None
        interval = np.float32(self.tokens_per_second) * np.float32(span.seconds_per_grid or 1.0)
        return (np.arange(span.grid_thw.t, dtype=np.float32) * interval).astype(np.int64)

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "tokens_per_second": self.tokens_per_second}
