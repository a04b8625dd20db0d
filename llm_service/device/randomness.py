"""Random numbers as a function of (seed, choice, output position), with no state to carry.

Philox 4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
vectorised in numpy. The numbers are made on the host, so a token drawn on any device, alone or in
any batch, begun here or continued on another worker, uses the same one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(
    counter: tuple[NDArray[np.uint64], ...], key: tuple[NDArray[np.uint64], ...]
) -> tuple[NDArray[np.uint64], ...]:
    """Four 32-bit words for each counter of four words and key of two; all below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _WORD) ^ c1 ^ k0,
            second & _LOW,
            (first >> _WORD) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seed: int, choice: int, first: int, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1 - 2**-52] for output positions first .. first + count - 1."""
    positions = np.arange(first, first + count, dtype=np.uint64)
    zeros = np.zeros_like(positions)
    counter = (positions & _LOW, positions >> _WORD, zeros + np.uint64(choice & 0xFFFFFFFF), zeros)
    key = (np.uint64(seed & 0xFFFFFFFF) + zeros, np.uint64(seed >> 32 & 0xFFFFFFFF) + zeros)
    high, low, _, _ = philox4x32(counter, key)
    bits = (high << _WORD | low) >> np.uint64(12)
    return bits.astype(np.float64) * 2.0**-52


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
