"""How many requests, and how many of their bytes, the gateway holds at once.

Beyond either bound a request is refused at once with 429 and Retry-After, so that accepted requests
keep their pace and memory stays bounded. A request is counted once its body has arrived: clients
that send slowly, or stop sending, do not keep others out.

Each request counts for its holder: its API key, or without keys its address. While there are
several holders, the last quarter of each bound is reserved for holders below an equal share, so no
holder can keep the others out, and a holder that is alone may use all of it. A key's own limits in
the key file (its rate and its requests in flight) apply independently of other holders.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from gateway.edge.auth import ANONYMOUS, Caller
from gateway.edge.limits import PICTURES_FRACTION, RESERVED_FRACTION, RETRY_AFTER_S
from gateway.edge.rates import KeyRates, SharedPlaces
from opticnerve.errors import Overloaded, RateLimited
from opticnerve.process import return_freed_memory

LARGE_REQUEST_BYTES = 4 * 2**20  # The end of a smaller request frees too little memory to trim.
TRIM_DELAY_S = 1.0


class SharedCapacity:
    """A bounded amount, and how much of it each holder uses.

    Where there is no room, ``check`` refuses a holder, and ``acquire`` waits: first in, first out,
    except that holders at their limit are passed over. Belongs to one event loop.
    """

    def __init__(
        self, what: str, most: int, most_each: int = 0, holders: Callable[[], int] = lambda: 1
    ) -> None:
        """``what``: the amount's name in errors. ``most_each``: the limit of one holder; 0:
        ``most``. ``holders()``: the number of holders that share the amount."""
        self.what = what
        self.most = most
        self.most_each = most_each or most
        self.held = 0
        self._holders = holders
        self._by_holder: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    def has_room(self, holder: str, amount: int = 1) -> bool:
        """Whether ``holder`` may have ``amount`` more, given what all holders have now."""
        has, held = self._by_holder[holder] + amount, self.held + amount
        if held > self.most or has > self.most_each:
            return False
        holders = self._holders()
        reserved = max(1, int(RESERVED_FRACTION * self.most)) if holders > 1 else 0
        equal = max(1, self.most // max(1, holders))
        return held <= self.most - reserved or has <= equal

    def add(self, holder: str, amount: int = 1) -> None:
        self.held += amount
        self._by_holder[holder] += amount

    def check(self, holder: str, amount: int = 1) -> None:
        """Raises Overloaded if ``holder`` cannot have ``amount`` more."""
        if self.has_room(holder, amount):
            return
        full = self.held + amount > self.most
        why = f" (limit {self.most})" if full else ": this key or address has its fair share"
        raise Overloaded(f"too many {self.what}{why}; retry later", retry_after_s=RETRY_AFTER_S)

    def held_by(self, holder: str) -> int:
        return self._by_holder.get(holder, 0)

    async def acquire(self, holder: str) -> None:
        """Waits for room for 1, and adds it; ``release`` gives it back."""
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
                self.release(holder)  # It got room and was cancelled in one turn of the event loop.
            raise

    def release(self, holder: str, amount: int = 1) -> None:
        self.held -= amount
        self._by_holder[holder] -= amount
        if not self._by_holder[holder]:
            del self._by_holder[holder]
        for place, (waiting, turn) in enumerate(self._waiting):
            if self.has_room(waiting) and not turn.done():
                del self._waiting[place]
                self.add(waiting)
                turn.set_result(None)
                return


class Admission:
    """Admits requests within three bounds: requests, requests with new pictures, and bytes; and
    realtime sessions, whose bytes count with those of requests."""

    def __init__(
        self,
        max_requests: int,
        max_bytes: int,
        max_requests_each: int = 0,
        holders: Callable[[], int] = lambda: 1,
        max_sessions: int = 1,
        rates: KeyRates | None = None,
        places: SharedPlaces | None = None,
    ) -> None:
        """``max_requests_each``: the limit of one holder, for requests and for sessions.
        ``holders``: see ``SharedCapacity``. ``rates``: the callers' use of their rates. ``places``:
        their requests in flight, where they are counted together with other processes."""
        what, most = "requests in flight", max(1, int(PICTURES_FRACTION * max_requests))
        self.requests = SharedCapacity(what, max_requests, max_requests_each, holders)
        self.with_pictures = SharedCapacity(f"{what} with new pictures", most, 0, holders)
        self.sessions = SharedCapacity(
            "realtime sessions", max_sessions, max_requests_each, holders
        )
        self.bytes = SharedCapacity("bytes held by requests in flight", max_bytes, 0, holders)
        self._rates = rates or KeyRates()
        self._places = places
        self._trim_timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def arrive(self, holder: str, caller: Caller = ANONYMOUS) -> Iterator[Ticket]:
        """Surrounds one request, from its head on, and releases whatever it holds at the end.
        Raises Overloaded if it would not be admitted, before its body is read. A request that is
        refused for lack of room does not count against the caller's rate."""
        self.requests.check(holder)
        with self.place(holder, caller):
            pass
        if caller.rate is not None:
            self._rates.take(caller.name, caller.rate)
        with self._ticket(holder, caller) as ticket:
            yield ticket

    @contextlib.contextmanager
    def place(self, holder: str, caller: Caller) -> Iterator[None]:
        """Surrounds a request in flight of ``caller``. Raises RateLimited at the caller's limit."""
        most, places = caller.concurrency, self._places
        full = 0 < most <= self.requests.held_by(holder)
        place = places.take(caller.name, most) if places and most and not full else None
        if full or (places and most and place is None):
            raise RateLimited(
                f"requests in flight of this key are limited to {most}; wait until one has ended",
                retry_after_s=RETRY_AFTER_S,
            )
        try:
            yield
        finally:
            if places and place is not None:
                places.give_back(caller.name, place)

    @contextlib.contextmanager
    def open_session(self, holder: str) -> Iterator[Ticket]:
        """Surrounds one realtime session. Its ticket holds what the session keeps; each of its
        responses is a request with a ticket of its own. Raises Overloaded."""
        with self._ticket(holder) as ticket:
            ticket.count_session()
            yield ticket

    @contextlib.contextmanager
    def _ticket(self, holder: str, caller: Caller = ANONYMOUS) -> Iterator[Ticket]:
        ticket = Ticket(self, holder, caller)
        try:
            yield ticket
        finally:
            ticket.release()
            if ticket.peak_bytes >= LARGE_REQUEST_BYTES:
                self._trim_soon()

    def _trim_soon(self) -> None:
        """Returns freed memory to the system once no large request has ended for a while. Under
        load the next request reuses it; afterwards it would count against this process for ever."""
        loop = asyncio.get_running_loop()
        if self._trim_timer is not None:
            self._trim_timer.cancel()
        self._trim_timer = loop.call_later(
            TRIM_DELAY_S, loop.run_in_executor, None, return_freed_memory
        )


class Ticket:
    """The capacity that one request or session holds; ``Admission`` releases it at its end."""

    def __init__(self, admission: Admission, holder: str, caller: Caller) -> None:
        self._admission = admission
        self._holder = holder
        self._caller = caller
        self._held: Counter[SharedCapacity] = Counter()
        self._place = contextlib.ExitStack()
        self.peak_bytes = 0

    @property
    def bytes(self) -> int:
        return self._held[self._admission.bytes]

    def count_request(self) -> None:
        """Counts the request among those being served. Raises Overloaded."""
        self._place.enter_context(self._admission.place(self._holder, self._caller))
        self._take(self._admission.requests)

    def count_session(self) -> None:
        """Counts a realtime session. Raises Overloaded."""
        self._take(self._admission.sessions)

    def count_with_pictures(self) -> None:
        """Counts the request among those with new pictures, which may wait long for an encoder and
        therefore leave some capacity to others. Raises Overloaded."""
        self._take(self._admission.with_pictures)

    def hold_bytes(self, num_bytes: int) -> None:
        """Counts bytes that the request keeps in memory. Raises Overloaded."""
        self._take(self._admission.bytes, num_bytes)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def free_bytes(self, num_bytes: int) -> None:
        """The request freed ``num_bytes``."""
        num_bytes = min(num_bytes, self.bytes)
        self._held[self._admission.bytes] -= num_bytes
        self._admission.bytes.release(self._holder, num_bytes)

    def release(self) -> None:
        for bound, amount in self._held.items():
            bound.release(self._holder, amount)
        self._held.clear()
        self._place.close()

    def _take(self, bound: SharedCapacity, amount: int = 1) -> None:
        if not amount:
            return  # A check for 0 would fail for a holder above its share, which may shrink.
        bound.check(self._holder, amount)
        bound.add(self._holder, amount)
        self._held[bound] += amount
