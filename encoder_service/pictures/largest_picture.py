"""The largest picture that a checkpoint's own settings permit, found by planning pictures."""

from __future__ import annotations

import math

from opticnerve.errors import InvalidMedia, StartupError
from opticnerve.media.plan import NO_OVERRIDES, Overrides, Plan, Structure
from opticnerve.models.family import Layout

ASPECTS = 32  # Aspects tried between square and ASPECT_LIMIT, in both directions.
ASPECT_LIMIT = 199.0  # Long strips may need more patches than squares: a side has at least one.
ROUNDING_MARGIN = 1.05  # An aspect that was not tried may round to a few more patches.


def largest_plan(layout: Layout, max_image_pixels: int) -> Plan:
    """The plan with the most patches, over pictures of ``max_image_pixels`` and many aspects.

    Raises StartupError if the family refuses them all.
    """
    best: Plan | None = None
    for step in range(-ASPECTS, ASPECTS + 1):
        plan = _plan(layout, max_image_pixels, ASPECT_LIMIT ** (step / ASPECTS))
        if plan is not None and (best is None or plan.num_patches > best.num_patches):
            best = plan
    if best is None:
        raise StartupError(
            "this checkpoint's processor settings admit no picture; check its "
            "preprocessor_config.json"
        )
    return _small_source(layout, best)


def _small_source(layout: Layout, plan: Plan) -> Plan:
    """A plan of as many patches from the smallest stored picture, which costs less to resize."""
    while True:
        half = Structure(plan.format, max(plan.width // 2, 1), max(plan.height // 2, 1))
        try:
            smaller = layout.plan(half, NO_OVERRIDES)
        except InvalidMedia:
            return plan
        if smaller.num_patches != plan.num_patches or smaller.width == plan.width:
            return plan
        plan = smaller


def permitted_patches(largest: Plan) -> int:
    """The most patches of a picture, given the largest of those that were tried."""
    return math.ceil(largest.num_patches * ROUNDING_MARGIN)


def shrink(layout: Layout, largest: Plan, patches: int) -> Plan:
    """A plan of at most about ``patches``, or the smallest that the family can make.

    Shrinks the stored picture, and the family's bound on pixels where it has one, since some
    families enlarge small pictures. For a family that resizes everything to one size, the plan
    stays as large.
    """
    pixels = largest.resized_width * largest.resized_height
    wanted = max(int(pixels * patches / largest.num_patches), 1)
    bounded = Overrides(max_pixels=wanted) if "max_pixels" in layout.settings() else NO_OVERRIDES
    smaller = _plan(layout, wanted, 1.0, bounded)
    if smaller is None or smaller.num_patches > largest.num_patches:
        return largest
    return smaller


def _plan(
    layout: Layout, pixels: int, aspect: float, overrides: Overrides = NO_OVERRIDES
) -> Plan | None:
    width = max(int(math.sqrt(pixels * aspect)), 1)
    height = max(pixels // width, 1)
    try:
        return layout.plan(Structure("png", width, height), overrides)
    except InvalidMedia:
        return None
