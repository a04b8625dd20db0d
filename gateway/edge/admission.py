"""How much work the gateway holds at once: requests and the bytes they bring.

Beyond either bound a request is refused at once with 429 and Retry-After, so that what was
accepted keeps its pace and memory stays bounded. A request takes its place when its body is
there: clients that send slowly, or nothing more, keep nobody out.

What a request takes is held by its key, or without keys by its address. Where there are several
such holders, the last quarter of everything is for those that have less than an equal share of it:
none can keep the others out, and one alone may have all.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from gateway.edge.memory import Trimmer
from opticnerve.errors import Overloaded

RETRY_AFTER_S = 1.0
PICTURES_SHARE = 0.75  # Of all places, for requests with new pictures: they may wait for long.
KEPT_SHARE = 0.25


class Bound:
    """Something of which there is so much, and who holds how much of it."""

    def __init__(
        self, what: str, most: int, holders: Callable[[], int], most_each: int = 0
    ) -> None:
        """``what``: for messages. ``holders()``: among how many it is shared. ``most_each``: what
        one of them may have at most; 0: ``most``."""
        self.what = what
        self.most = most
        self.most_each = most_each or most
        self.held = 0
        self._holders = holders
        self._by_holder: Counter[str] = Counter()

    def check(self, holder: str, amount: int = 1) -> None:
        """Raises Overloaded where a holder cannot have so much more."""
        if self.held + amount > self.most:
            raise _overloaded(f"{self.what} are as many as this server takes")
        if not self._is_fair(self._by_holder[holder] + amount, self.held + amount):
            raise _overloaded(f"{self.what} are many, and this caller has its share of them")

    def take(self, holder: str, amount: int = 1) -> None:
        """Raises Overloaded."""
        self.check(holder, amount)
        self.held += amount
        self._by_holder[holder] += amount

    def release(self, holder: str, amount: int) -> None:
        self.held -= amount
        self._by_holder[holder] -= amount
        if not self._by_holder[holder]:
            del self._by_holder[holder]

    def _is_fair(self, own: int, held: int) -> bool:
        holders = self._holders()
        kept = max(1, int(KEPT_SHARE * self.most)) if holders > 1 else 0
        equal = max(1, self.most // max(1, holders))
        return own <= self.most_each and (held <= self.most - kept or own <= equal)


def _overloaded(why: str) -> Overloaded:
    return Overloaded(f"{why}; retry later", retry_after_s=RETRY_AFTER_S)


class Admission:
    def __init__(
        self,
        max_requests: int,
        max_bytes: int,
        max_requests_each: int = 0,
        holders: Callable[[], int] = lambda: 1,
    ) -> None:
        """``max_requests_each``, ``holders``: see ``Bound``."""
        served = "the requests being served"
        pictured = max(1, int(PICTURES_SHARE * max_requests))
        self.requests = Bound(served, max_requests, holders, max_requests_each)
        self.with_pictures = Bound(f"{served} with new pictures", pictured, holders)
        self.bytes = Bound("the bytes that requests hold", max_bytes, holders)
        self._trimmer = Trimmer()

    @contextlib.contextmanager
    def arrive(self, holder: str) -> Iterator[Ticket]:
        """One request, from its head on; whatever it holds is given back at the end.

        Raises Overloaded where it would get no place: then its body need not come.
        """
        self.requests.check(holder)
        ticket = Ticket(self, holder)
        try:
            yield ticket
        finally:
            ticket.release()
            self._trimmer.ended(ticket.peak)


class Ticket:
    """What one request holds; ``Admission.arrive`` releases it."""

    def __init__(self, owner: Admission, holder: str) -> None:
        self._owner = owner
        self._holder = holder
        self._places = 0
        self._with_pictures = 0  # Of these.
        self.bytes = 0
        self.peak = 0

    def enter(self) -> None:
        """Takes the place of a request that is served. Raises Overloaded."""
        self._owner.requests.take(self._holder)
        self._places += 1

    def enter_with_pictures(self) -> None:
        """Takes one of the places that requests with new pictures may have, so that such as wait
        for an encoder leave some to others. Raises Overloaded."""
        self._owner.with_pictures.take(self._holder)
        self._with_pictures += 1

    def hold(self, num_bytes: int) -> None:
        """Counts bytes that the request keeps in memory. Raises Overloaded."""
        self._owner.bytes.take(self._holder, num_bytes)
        self.bytes += num_bytes
        self.peak = max(self.peak, self.bytes)

    def drop(self, num_bytes: int) -> None:
        """The request let go of ``num_bytes``."""
        num_bytes = min(num_bytes, self.bytes)
        self.bytes -= num_bytes
        self._owner.bytes.release(self._holder, num_bytes)

    def release(self) -> None:
        self.drop(self.bytes)
        self._owner.requests.release(self._holder, self._places)
        self._owner.with_pictures.release(self._holder, self._with_pictures)
        self._with_pictures = 0
        self._places = 0
