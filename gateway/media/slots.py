"""Slots that are waited for, of which each holder has at most a share."""

from __future__ import annotations

import asyncio

from gateway.edge.admission import SharedCapacity


class FairSlots(SharedCapacity):
    """Slots given in the order of asking, but past holders that have their share already: one that
    asks for many waits for its own."""

    def __init__(self, most: int, most_each: int) -> None:
        super().__init__(most, most_each)
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    async def acquire(self, holder: str) -> None:
        """Waits for a slot; ``release`` gives it back, from the event loop."""
        if self.has_room(holder):
            self.add(holder)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((holder, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove((holder, turn))
            else:
                self.release(holder)  # Given and cancelled in one turn of the event loop.
            raise

    def release(self, holder: str, amount: int = 1) -> None:
        super().release(holder, amount)
        for place, (waiting, turn) in enumerate(self._waiting):
            if self.has_room(waiting) and not turn.done():
                del self._waiting[place]
                self.add(waiting)
                turn.set_result(None)
                return
