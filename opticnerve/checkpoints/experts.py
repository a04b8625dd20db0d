"""Where a checkpoint's tensor goes in a module, for experts that are not published as stacks.

transformers stacks the experts of a layer: ``experts.gate_up_proj`` [experts, 2 * width, hidden]
and ``experts.down_proj`` [experts, hidden, width]. A checkpoint holds these stacks, or the stacks
with their last two dimensions exchanged, or each expert's projections
(``experts.7.up_proj.weight``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

STACKS = (".experts.gate_up_proj", ".experts.down_proj")
PIECE = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
PARTS = {"gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2)}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor of a module, or one expert's piece of it."""

    name: str  # The tensor's name in the module.
    expert: int | None = None  # None: the whole tensor.
    part: int = 0  # Which of ``parts`` equal parts of the expert's rows.
    parts: int = 1

    @classmethod
    def of(cls, name: str) -> TensorPlace:
        """``name``: a checkpoint's key, renamed to the module's."""
        piece = PIECE.fullmatch(name)
        if piece is None:
            return cls(name)
        experts, number, projection = piece.groups()
        stack, part, parts = PARTS.get(projection, (projection, 0, 1))
        return cls(f"{experts}.{stack}", int(number), part, parts)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of this place in the module's ``tensor``. Raises IndexError for an expert that
        the module does not have."""
        if self.expert is None:
            return tensor
        return tensor[self.expert].chunk(self.parts)[self.part]

    def is_exchanged(self, shape: tuple[int, ...], tensor: torch.Tensor) -> bool:
        """Whether a stack of ``shape`` needs its last two dimensions exchanged."""
        wanted = tuple(tensor.shape)
        exchanged = self._is_stack(tensor) and shape == (wanted[0], wanted[2], wanted[1])
        return exchanged and shape != wanted

    def is_square_stack(self, tensor: torch.Tensor) -> bool:
        """Whether this is a stack whose shape does not tell if it needs to be exchanged."""
        return self._is_stack(tensor) and tensor.shape[1] == tensor.shape[2]

    def _is_stack(self, tensor: torch.Tensor) -> bool:
        return self.expert is None and self.name.endswith(STACKS) and tensor.ndim == 3
