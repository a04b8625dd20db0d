"""What stages cost: measured on a running stack, or written by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from opticnerve.errors import StartupError


@dataclass(frozen=True)
class PictureCost:
    """A picture of one size, as the model sees it."""

    patches: int  # Patches of the tower's input, by which batches are counted.
    tokens: int  # Prompt tokens.


@dataclass(frozen=True)
class Rates:
    """Costs in seconds, and limits of one worker of each kind.

    A batch of an encoder takes ``batch_s + patch_s * patches``, a step of an LLM worker ``step_s +
    sequence_s * decoding sequences + prefill_token_s * prefilled tokens``.
    """

    gateway_s: float  # The part of TTFT that no other cost explains.
    picture_s: float  # The same for a picture: reading, sending, storing and loading.
    prepare_s: float  # Decoding and resizing it, on one of ``prepare_workers`` threads.
    batch_s: float
    patch_s: float
    step_s: float
    sequence_s: float
    prefill_token_s: float
    sizes: dict[str, PictureCost] = field(default_factory=dict)  # By WIDTHxHEIGHT.
    prepare_workers: int = 1
    max_batch_patches: int = 16_384
    max_sequences: int = 64
    max_batched_tokens: int = 2048
    max_step_s: float = 0.25
    kv_tokens: int = 2**20

    def picture(self, size: str) -> PictureCost:
        """Raises StartupError for a size that was not measured."""
        if size not in self.sizes:
            known = ", ".join(self.sizes) or "none"
            raise StartupError(f"the rates know no pictures of {size} (known: {known})")
        return self.sizes[size]

    @classmethod
    def read(cls, path: Path) -> Rates:
        """Reads the JSON of ``document``, or JSON written by hand. Raises StartupError."""
        try:
            value = json.loads(path.read_text())
            return cls.of(value.get("rates", value))
        except OSError as error:
            raise StartupError(f"--rates: cannot read {path}: {error}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise StartupError(f"--rates: {path}: {error}") from error

    @classmethod
    def of(cls, value: dict[str, Any]) -> Rates:
        """Raises ValueError for a field that is unknown, missing or not a number of at least 0."""
        kinds = {item.name: item for item in fields(cls)}
        for name, number in value.items():
            if name not in kinds:
                raise ValueError(f"unknown field {name!r}")
            if name != "sizes" and not (isinstance(number, int | float) and number >= 0):
                raise ValueError(f"{name}: expected a number from 0 up, got {number!r}")
        sizes = {
            size: PictureCost(int(cost["patches"]), int(cost["tokens"]))
            for size, cost in value.get("sizes", {}).items()
        }
        return cls(**{**value, "sizes": sizes})

    def document(self) -> dict[str, Any]:
        return asdict(self)
