"""Overwrites the input embeddings of placeholders with rows of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llm_service.device.batch import Batch
from llm_service.device.memory import to_device
from llm_service.policy.row_source import RowSource
from llm_service.policy.step_plan import Segment
from opticnerve.embeddings.ref import tensor_names
from opticnerve.errors import EmbeddingCorrupt
from opticnerve.models.family import LanguageModel


@dataclass(frozen=True, slots=True)
class Overwrite:
    """Checked rows of an item that replace input embeddings of one work."""

    offset: int  # From the work's first token.
    rows: torch.Tensor  # [n, hidden_size]
    levels: dict[int, torch.Tensor]  # The same rows of each DeepStack level.


class ItemRows:
    """Reads rows from their source and writes them into a step's input embeddings."""

    def __init__(self, source: RowSource, language: LanguageModel, deepstack_levels: int) -> None:
        self._source = source
        self._tensor_names = tensor_names(deepstack_levels)  # "rows", then the levels.
        self._width = language.hidden_size
        self._dtype = language.dtype
        self._device = torch.device(language.device)

    def read(self, segment: Segment) -> Overwrite:
        """Reads and checks a segment's rows. Raises EmbeddingUnavailable; rows that do not fit the
        model are discarded at their source."""
        key = segment.item_key
        tensors = self._source.get(key)
        try:
            if tensors.keys() != set(self._tensor_names):
                raise EmbeddingCorrupt(
                    "an embedding does not have exactly the tensors that this model needs: "
                    f"{', '.join(self._tensor_names)}",
                    param=key,
                )
            slices = {
                level: self._slice(tensors[name], segment)
                for level, name in enumerate(self._tensor_names, start=-1)
            }
        except EmbeddingCorrupt:
            self._source.discard(key)
            raise
        return Overwrite(segment.chunk_offset, slices.pop(-1), slices)

    def write(
        self, embeds: torch.Tensor, batch: Batch, overwrites: Mapping[int, Sequence[Overwrite]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Writes ``overwrites``, by slot, into ``embeds`` [T, hidden_size].

        Returns (indices of packed tokens, rows) of each DeepStack level, which the decoder adds.
        """
        found: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for work, first in zip(batch.works, batch.first_indices, strict=True):
            for each in overwrites.get(work.slot, ()):
                row = first + each.offset
                embeds[row : row + len(each.rows)] = each.rows
                for level, rows in each.levels.items():
                    found.setdefault(level, []).append((row, rows))
        return [self._level(found.get(i, [])) for i in range(max(found, default=-1) + 1)]

    def _slice(self, tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
        """The segment's rows, on the device, in the model's dtype. Raises EmbeddingCorrupt."""
        last = segment.row_start + segment.num_rows
        fits = tensor.ndim == 2 and tensor.shape[1] == self._width and tensor.shape[0] >= last
        if not fits or not tensor.is_floating_point():
            raise EmbeddingCorrupt(
                f"an embedding has shape {tuple(tensor.shape)}, {tensor.dtype}; expected rows up "
                f"to {last} of width {self._width}",
                param=segment.item_key,
            )
        rows = tensor[segment.row_start : last]  # Finite: that was checked as they were loaded.
        return rows.to(self._device, self._dtype, non_blocking=True)

    def _level(
        self, parts: Sequence[tuple[int, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not parts:
            empty = torch.empty(0, dtype=torch.int64, device=self._device)
            return empty, torch.empty((0, self._width), device=self._device)
        indices = np.concatenate([np.arange(row, row + len(rows)) for row, rows in parts])
        return to_device(indices, self._device), torch.cat([rows for _, rows in parts])
