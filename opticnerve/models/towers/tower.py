"""A vision tower as a family declares it, and its loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from opticnerve.checkpoints.loader import Recompute, load_module, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from opticnerve.checkpoints.checkpoint import Checkpoint
    from opticnerve.models.family import KeyMap, Tower


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """A tower's module and what runs it. ``load`` makes it a ``family.Tower``."""

    make_module: Callable[[], nn.Module]
    make_tower: Callable[[Any], Tower]  # From the loaded module.
    # As in ``loader.load_module``.
    recomputed: Mapping[str, Recompute] = field(default_factory=dict)
    ignored: Sequence[str] = ()

    def load(
        self,
        checkpoint: Checkpoint,
        keys: KeyMap,
        dtype: str | torch.dtype,
        device: str | torch.device,
    ) -> Tower:
        """The vision half of ``checkpoint``, whose keys ``keys`` renames. Raises CheckpointError,
        see ``loader.load_module``."""
        module = load_module(
            self.make_module,
            checkpoint,
            keys,
            dtype=resolve_dtype(dtype, checkpoint, resolve_device(device)),
            device=resolve_device(device),
            recomputed=self.recomputed,
            ignored=self.ignored,
        )
        return self.make_tower(module)


class ModuleTower:
    """What the towers here share: a torch module, and where and in what it computes."""

    def __init__(self, module: Any, hidden_size: int) -> None:
        self.module = module
        self.hidden_size = hidden_size
        weight = next(module.parameters())
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device


def without_batch(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` in memory of their own: a view would keep the whole batch's alive."""
    whole = rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()
    return rows if whole else rows.clone()
