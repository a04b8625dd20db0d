"""A picture of the caller, prepared for an encoder: its plan and content key. No transport."""

from __future__ import annotations

from dataclasses import dataclass

from opticnerve.generation.checks import UINT64, check_integer
from opticnerve.media.keys import content_key
from opticnerve.media.plan import WHITE, Overrides, Plan
from opticnerve.media.structure import parse_structure
from opticnerve.models.family import Layout

NO_OVERRIDES = Overrides()


@dataclass(frozen=True, slots=True)
class PlannedPicture:
    """One picture, ready for an encoder that has ``fingerprint``."""

    data: bytes
    key: str
    plan: Plan
    overrides: Overrides
    fingerprint: str


def plan_picture(
    data: bytes, layout: Layout, fingerprint: str, overrides: Overrides = NO_OVERRIDES
) -> PlannedPicture:
    """Plans a picture from its structure, and computes its key. Raises InvalidMedia,
    InvalidRequest."""
    for name, most in (("min_pixels", UINT64), ("max_pixels", UINT64), ("background", WHITE)):
        if (value := getattr(overrides, name)) is not None:
            check_integer(name, value, most)
    plan = layout.plan(parse_structure(data), overrides)
    key = content_key(data, layout.settings(), overrides, fingerprint)
    return PlannedPicture(data, key, plan, overrides, fingerprint)
