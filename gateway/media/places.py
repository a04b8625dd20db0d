"""Places that many want at once, of which one name holds at most its share."""

from __future__ import annotations

import asyncio
from collections import Counter


class Places:
    """So many places. They are given in the order of asking, but past those whose name holds its
    share already: who asks for much waits for himself."""

    def __init__(self, places: int, share: int) -> None:
        """``share``: places that one name may hold."""
        self.free = places
        self._share = share
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    async def take(self, name: str) -> None:
        """Waits for a place; ``give`` it back in the end, from the event loop."""
        if self._has_room(name):
            self._hold(name)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((name, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove((name, turn))
            else:
                self.give(name)  # It came too late.
            raise

    def give(self, name: str) -> None:
        self.free += 1
        self._held[name] -= 1
        if not self._held[name]:
            del self._held[name]
        for place, (waiting, turn) in enumerate(self._waiting):
            if self._has_room(waiting) and not turn.done():
                del self._waiting[place]
                self._hold(waiting)
                turn.set_result(None)
                return

    def _has_room(self, name: str) -> bool:
        return self.free > 0 and self._held[name] < self._share

    def _hold(self, name: str) -> None:
        self.free -= 1
        self._held[name] += 1
