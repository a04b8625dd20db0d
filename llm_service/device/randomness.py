"""Random numbers as a function of (seed, choice, output position), with no state to carry.

numpy's Philox is a counter: its numbers can be had from any position on. They are made on the host,
so a token drawn on any device, alone or in any batch, begun here or continued on another worker,
uses the same one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORDS = 4  # Numbers that Philox makes of one value of its counter.


def uniforms(seed: int, choice: int, first: int, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1 - 2**-52] for output positions first .. first + count - 1.

    ``seed``: 64 bits.
    """
    key = np.array([seed, choice], dtype=np.uint64)
    skipped = first % WORDS
    words = np.random.Philox(key=key, counter=first // WORDS).random_raw(skipped + count)
    return (words[skipped:] >> np.uint64(12)).astype(np.float64) * 2.0**-52


class UniformCache:
    """The next numbers of every slot, made BLOCK at a time."""

    BLOCK = 64

    def __init__(self, num_slots: int) -> None:
        self._values = np.zeros((num_slots, self.BLOCK))
        self._firsts = np.full(num_slots, -1, dtype=np.int64)
        self._streams: list[tuple[int, int]] = [(0, 0)] * num_slots

    def admit(self, slot: int, seed: int, choice: int) -> None:
        """The slot belongs to this stream from now on."""
        self._streams[slot] = (seed, choice)
        self._firsts[slot] = -1

    def take(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """One number for each (slot, output position)."""
        offsets = positions - self._firsts[slots]
        stale = (self._firsts[slots] < 0) | (offsets < 0) | (offsets >= self.BLOCK)
        for slot, position in zip(slots[stale].tolist(), positions[stale].tolist(), strict=True):
            first = position - position % self.BLOCK
            seed, choice = self._streams[slot]
            self._values[slot] = uniforms(seed, choice, first, self.BLOCK)
            self._firsts[slot] = first
        taken: NDArray[np.float64] = self._values[slots, positions - self._firsts[slots]]
        return taken
