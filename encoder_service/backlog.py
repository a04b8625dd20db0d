"""The items that an encoder has accepted and not finished, counted in patches, items and bytes.

The backlog bounds memory and waiting time, and measures throughput. An item that does not fit is
refused with a retry hint; this is checked before its bytes are read, and again once they have
arrived. It counts only from then on, so that a caller that sends no bytes does not keep others out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from encoder_service import metrics
from opticnerve.errors import Overloaded
from opticnerve.telemetry.throughput import Throughput

MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0
UNKNOWN_RETRY_S = 1.0  # Used before the first item, while the throughput is unknown.


class BacklogPlace:
    """One accepted item's place in the backlog. ``release`` is idempotent."""

    def __init__(self, backlog: Backlog, patches: int, num_bytes: int) -> None:
        self.patches = patches
        self.num_bytes = num_bytes
        self._backlog: Backlog | None = backlog

    def release(self) -> None:
        backlog, self._backlog = self._backlog, None
        if backlog is not None:
            backlog._add(-1, -self.patches, -self.num_bytes)


class Backlog:
    """The items that the encoder has accepted and not finished. Belongs to one event loop.

    Bounds: ``max_patches``, ``max_items`` and ``max_bytes`` (compressed). One item always fits an
    empty backlog, however large it is. ``clock`` returns seconds.
    """

    def __init__(
        self,
        max_patches: int,
        max_items: int,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_patches = max_patches
        self.max_items = max_items
        self.max_bytes = max_bytes
        self.patches = 0
        self.items = 0
        self.num_bytes = 0
        self._encoded = Throughput(clock)

    def can_admit(self, patches: int, num_bytes: int) -> bool:
        return self.items == 0 or (
            self.items < self.max_items
            and self.patches + patches <= self.max_patches
            and self.num_bytes + num_bytes <= self.max_bytes
        )

    def check_room(self, patches: int, num_bytes: int) -> None:
        """Raises Overloaded if an item could not be admitted now."""
        if not self.can_admit(patches, num_bytes):
            raise Overloaded(
                f"the encoder's queue is full ({self.items} items, {self.patches} patches); retry "
                "later",
                retry_after_s=self.retry_after_s,
            )

    def admit(self, patches: int, num_bytes: int) -> BacklogPlace:
        """Takes a place, which the caller releases. Raises Overloaded if there is none."""
        self.check_room(patches, num_bytes)
        if self.items == 0:
            self._encoded.begin()
        self._add(1, patches, num_bytes)
        return BacklogPlace(self, patches, num_bytes)

    def _add(self, items: int, patches: int, num_bytes: int) -> None:
        self.items += items
        self.patches += patches
        self.num_bytes += num_bytes
        metrics.PATCHES_PENDING.set(self.patches)
        metrics.ITEMS_PENDING.set(self.items)

    def record(self, patches: int) -> None:
        """Counts an encoded item of ``patches`` in the throughput. Its place is released apart."""
        self._encoded.record(patches)

    @property
    def patches_per_s(self) -> float:
        """Throughput from arrival to embedding while there is work; 0 before the first item."""
        return self._encoded.per_s

    @property
    def retry_after_s(self) -> float:
        """Seconds until about half of the backlog will be done, by the throughput so far."""
        if self.patches_per_s == 0:
            return UNKNOWN_RETRY_S
        wait = self.patches / 2 / self.patches_per_s
        return min(max(wait, MIN_RETRY_S), MAX_RETRY_S)

    def check_integrity(self) -> None:
        """Raises RuntimeError when an idle backlog still counts something."""
        if self.items == 0 and (self.patches or self.num_bytes):
            raise RuntimeError(f"no items, but {self.patches} patches, {self.num_bytes} bytes")
        if min(self.items, self.patches, self.num_bytes) < 0:
            raise RuntimeError("released more than was admitted")
